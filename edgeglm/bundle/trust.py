"""Whose bundles this machine takes.

The trust folder holds the public keys, one ``.pub`` file each: ``$EDGEGLM_TRUST``, or
``~/.config/edgeglm/trust``. As soon as one key is there, every bundle must be signed by one of them;
adding a file trusts a key, removing it ends that. ``seen.json`` remembers the newest bundle of each
name that was finalized, and an older one is then a replay.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgeglm.bundle.atomic import disk_errors
from edgeglm.bundle.manifest import Manifest
from edgeglm.bundle.signing import (
    PublicKey,
    can_check,
    is_valid,
    key_of,
    public_key_from_file,
    signatures_from_bytes,
)
from edgeglm.core.errors import UserError

TRUST_VARIABLE = "EDGEGLM_TRUST"
SEEN_NAME = "seen.json"


@dataclass(frozen=True, kw_only=True)
class Trust:
    """A policy.

    Attributes:
        folder: Where it was read; None for one that remembers nothing.
        keys: Whose signatures count. With none, no signature is asked for.
        allow_unsigned: Take a bundle that no trusted key signed.
        allow_downgrade: Take a bundle that is older than one finalized before.
    """

    folder: Path | None = None
    keys: tuple[PublicKey, ...] = ()
    allow_unsigned: bool = False
    allow_downgrade: bool = False

    @property
    def required(self) -> bool:
        """Whether a trusted signature is asked for."""
        return bool(self.keys) and not self.allow_unsigned


@dataclass(frozen=True, kw_only=True)
class SignatureState:
    """What the signatures of an opened bundle are worth here.

    Attributes:
        signed: Whether it carries any.
        signer: The trusted key that made one of them; None if there is none.
        words: The same for a person.
    """

    signed: bool
    signer: PublicKey | None
    words: str = field(compare=False)


def trust_here(*, allow_unsigned: bool = False, allow_downgrade: bool = False) -> Trust:
    """Read this machine's trust folder. Raises UserError when a key in it cannot be read."""
    named = os.environ.get(TRUST_VARIABLE)
    folder = Path(named) if named else Path.home() / ".config" / "edgeglm" / "trust"
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix == ".pub")
    except FileNotFoundError:
        files = []
    except OSError as error:
        raise UserError(f"cannot look into {folder}: {error.strerror}; make it readable") from error
    return Trust(
        folder=folder,
        keys=tuple(public_key_from_file(path) for path in files),
        allow_unsigned=allow_unsigned,
        allow_downgrade=allow_downgrade,
    )


def check_signatures(trust: Trust, manifest: bytes, signatures: bytes | None, origin: str) -> SignatureState:
    """Hold the raw manifest against its signatures, before a byte of it is parsed.

    Raises:
        UserError: a signature is broken, or none is of a trusted key where one is asked for.
    """
    if signatures is None:
        if trust.required:
            raise UserError(
                f"{origin} is not signed, and this machine takes bundles of "
                f"{', '.join(key.name for key in trust.keys)} only; "
                "have it signed, or pass --allow-unsigned"
            )
        return SignatureState(signed=False, signer=None, words="not signed")
    found = signatures_from_bytes(signatures, origin).signatures
    if not trust.keys and not can_check():
        words = "signed; install edgeglm[sign] to check by whom"
        return SignatureState(signed=True, signer=None, words=words)
    trusted = {key.id: key for key in trust.keys}
    signer, strangers = None, []
    for signature in found:
        key = key_of(signature, origin)
        if not is_valid(signature, manifest, key, origin):
            raise UserError(
                f"{origin}: the signature of {signature.name or key.id} does not fit the manifest: one of "
                "them was altered; get the bundle from its maker again"
            )
        signer = signer or trusted.get(key.id)
        if key.id not in trusted:
            strangers.append(key.id)
    if signer is not None:
        return SignatureState(signed=True, signer=signer, words=f"signed by {signer.name} ({signer.id})")
    words = f"signed by a key that is not trusted here ({', '.join(strangers)})"
    if trust.required:
        raise UserError(
            f"{origin} is {words}; put that key's .pub file into {trust.folder} if it is the maker's, "
            "or pass --allow-unsigned"
        )
    return SignatureState(signed=True, signer=None, words=words)


class _Seen(msgspec.Struct, frozen=True, kw_only=True):
    """``seen.json``: ``{bundle name: when the newest accepted one was made}``."""

    newest: dict[str, str] = {}


def check_age(trust: Trust, manifest: Manifest, origin: str) -> None:
    """Raise UserError for a bundle that is older than one of its name that was accepted before.

    ``allow_unsigned`` does not change this: to go back is a decision of its own.
    """
    if trust.folder is None or not trust.keys or trust.allow_downgrade:
        return
    newest = _seen(trust.folder).newest.get(manifest.name)
    if newest is not None and moment_of(manifest.created) < moment_of(newest):
        raise UserError(
            f"{origin} was made on {manifest.created}, and this machine has had {manifest.name} of {newest}: "
            "an old one may be a replay; pass --allow-downgrade if you mean it"
        )


def check_memory(trust: Trust, signature: SignatureState) -> None:
    """Raise UserError where ``accept`` could not remember a bundle: asked before engines are built for it.

    Who allows a downgrade needs no memory.
    """
    if _remembers(trust, signature) and not (trust.allow_downgrade or _writable(trust)):
        raise UserError(
            f"this user cannot write to {trust.folder}, where the age of the newest bundle is remembered, so "
            "an old one could be replayed later; make it writable, or pass --allow-downgrade to go without"
        )


def _remembers(trust: Trust, signature: SignatureState) -> bool:
    return trust.folder is not None and signature.signer is not None


def _writable(trust: Trust) -> bool:
    return trust.folder is not None and os.access(trust.folder, os.W_OK | os.X_OK)


def accept(trust: Trust, manifest: Manifest, signature: SignatureState) -> None:
    """Remember a bundle that was finalized, and after a permitted downgrade the older one.

    One that no trusted key signed is not remembered: nobody vouches for the date that it states, and one
    of the year 9999 would lock all later ones out.
    """
    if not _remembers(trust, signature) or (trust.allow_downgrade and not _writable(trust)):
        return
    assert trust.folder is not None
    path = trust.folder / SEEN_NAME
    with disk_errors(path), (trust.folder / ".seen.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = {**_seen(trust.folder).newest, manifest.name: manifest.created}
        new = path.with_name(f".{SEEN_NAME}.{uuid.uuid4().hex}")
        try:
            new.write_bytes(msgspec.json.encode(_Seen(newest=newest)))
            new.replace(path)
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)


def _seen(folder: Path) -> _Seen:
    path = folder / SEEN_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Seen)
    except FileNotFoundError:
        return _Seen()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; mend it, or remove it to forget the past") from error


def moment_of(text: str) -> datetime.datetime:
    """Return the moment that an ISO date means, in UTC where it names no zone. Raises ValueError."""
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)
