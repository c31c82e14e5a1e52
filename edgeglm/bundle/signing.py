"""Ed25519 signatures over a bundle's manifest, which holds the digest of every other byte.

``signatures.json`` lies beside ``manifest.json`` and is the one file that the manifest does not list.
A bundle may carry several signatures, so that a new key can be introduced while devices still trust
the old one. What is signed is the manifest's exact bytes behind a word that says what they are, so
that a signature made for something else can never pass for one of a bundle. Source: RFC 8032, through
the package ``cryptography`` (extra ``sign``), which is imported when a key is first used.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edgeglm.bundle.atomic import disk_errors
from edgeglm.bundle.manifest import SIGNATURES_NAME
from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import UserError

MAX_SIGNATURES_BYTES = 64 << 10

_CONTEXT = b"edgeglm bundle manifest, signature 1\0"
_MAX_KEY_BYTES = 8 << 10
_MAX_SIGNATURES, _MAX_NAME = 16, 100
_PUBLIC_BYTES, _SIGNATURE_BYTES = 32, 64

Base64 = Annotated[str, msgspec.Meta(max_length=128)]


class Signature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One signature. ``public_key`` and ``signature`` are raw bytes in base64."""

    algorithm: Literal["ed25519"] = "ed25519"
    public_key: Base64
    signature: Base64
    name: Annotated[str, msgspec.Meta(max_length=_MAX_NAME)] = ""


class Signatures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``signatures.json``."""

    schema: Literal[1] = 1
    signatures: Annotated[tuple[Signature, ...], msgspec.Meta(min_length=1, max_length=_MAX_SIGNATURES)]


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """A key that signatures are held against. ``id`` is the sha256 of the raw key."""

    id: str
    name: str
    raw: bytes


def make_key(folder: Path, name: str) -> tuple[Path, PublicKey]:
    """Make a key pair: ``<name>.key``, readable by its owner alone, and ``<name>.pub``.

    Raises UserError when one of the files is there already or cannot be written.
    """
    ed25519, serialization = _cryptography()
    if not name or set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"):
        raise UserError(f"{name!r} is no name for a key; use letters, digits, dots and dashes")
    private = ed25519.Ed25519PrivateKey.generate()
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    places = [folder / f"{name}.key", folder / f"{name}.pub"]
    for place in places:
        if place.exists():
            raise UserError(f"{place} is there already; choose another name, or remove it yourself")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for place, data, mode in zip(places, (secret, public), (0o600, 0o644), strict=True):
            handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
    return places[0], public_key_from_file(places[1])


def public_key_from_file(path: Path) -> PublicKey:
    """Read a ``.pub`` file (PEM). Raises UserError when it is no Ed25519 public key."""
    ed25519, serialization = _cryptography()
    try:
        loaded = serialization.load_pem_public_key(_key_bytes(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no public key; make one with 'edgeglm keygen'") from error
    except Exception as error:  # cryptography's UnsupportedAlgorithm is no ValueError
        raise UserError(f"{path} is no key that can be used here: {error}; use an Ed25519 key") from error
    if not isinstance(loaded, ed25519.Ed25519PublicKey):
        raise UserError(f"{path} is no Ed25519 public key; make one with 'edgeglm keygen'")
    raw = loaded.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return PublicKey(id=sha256_bytes(raw), name=path.stem, raw=raw)


def signature_of(manifest: bytes, key: Path) -> Signature:
    """Sign a manifest's bytes with a ``.key`` file. Raises UserError when it is no such key."""
    ed25519, serialization = _cryptography()
    try:
        private = serialization.load_pem_private_key(_key_bytes(key), password=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{key} is no private key; make one with 'edgeglm keygen'") from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise UserError(f"{key} is no Ed25519 private key; make one with 'edgeglm keygen'")
    raw = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return Signature(
        public_key=base64.b64encode(raw).decode(),
        signature=base64.b64encode(private.sign(_CONTEXT + manifest)).decode(),
        name=_name_of(key),
    )


def _name_of(key: Path) -> str:
    """Return what a signature calls its key: a word for people, as long as one may be and of plain text."""
    return os.fsencode(key.stem).decode("utf-8", "replace")[:_MAX_NAME]


def signatures_from_bytes(data: bytes, origin: str) -> Signatures:
    """Parse ``signatures.json``. Raises UserError when it is something else."""
    remedy = "get the bundle from its maker again, or have it signed anew"
    if len(data) > MAX_SIGNATURES_BYTES:
        raise UserError(f"{origin}: {SIGNATURES_NAME} has {len(data)} bytes; {remedy}")
    try:
        return msgspec.json.decode(data, type=Signatures)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{origin}: {SIGNATURES_NAME} cannot be read: {error}; {remedy}") from error


def signatures_bytes(signatures: Iterable[Signature]) -> bytes:
    """Return the bytes of ``signatures.json``: one signature a key, the last one counts.

    Raises UserError for more than a bundle may carry.
    """
    by_key = {signature.public_key: signature for signature in signatures}
    if len(by_key) > _MAX_SIGNATURES:
        raise UserError(
            f"these are {len(by_key)} signatures, and a bundle carries {_MAX_SIGNATURES} at most; "
            "sign with fewer keys, or drop the former signatures with --replace"
        )
    whole = Signatures(signatures=tuple(by_key[key] for key in sorted(by_key)))
    return msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n"


def key_of(signature: Signature, origin: str) -> PublicKey:
    """Return the key that a signature claims. Raises UserError when it is no key."""
    raw = _decoded(signature.public_key, _PUBLIC_BYTES, origin)
    return PublicKey(id=sha256_bytes(raw), name=signature.name, raw=raw)


def is_valid(signature: Signature, manifest: bytes, key: PublicKey, origin: str) -> bool:
    """Say whether ``key`` made this signature of these very bytes."""
    ed25519, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature

    raw = _decoded(signature.signature, _SIGNATURE_BYTES, origin)
    with suppress(InvalidSignature, ValueError):
        ed25519.Ed25519PublicKey.from_public_bytes(key.raw).verify(raw, _CONTEXT + manifest)
        return True
    return False


def can_check() -> bool:
    """Say whether ``cryptography`` is installed."""
    import importlib.util

    return importlib.util.find_spec("cryptography") is not None


def _decoded(text: str, size: int, origin: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    # The last letter before the padding holds bits that count for nothing: one spelling only is taken.
    if len(raw) != size or base64.b64encode(raw).decode() != text:
        raise UserError(f"{origin}: {SIGNATURES_NAME} holds no {size} bytes; have the bundle signed anew")
    return raw


def _key_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_KEY_BYTES:
            raise UserError(f"{path} is too large for a key; give a file that 'edgeglm keygen' made")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the key {path}: {error.strerror}; give a readable key") from error


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UserError(
            f"signatures need the package cryptography ({error}); pip install 'edgeglm[sign]'"
        ) from error
    return ed25519, serialization
