"""What a device says of the engines it built, brought home: kept per board and library version.

Of each bundle on each kind of board with each version of the library the newest is kept, and found again: its
timing cache goes along to the next board of that kind.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.core.digest import sha256_json
from edgeglm.core.errors import UserError
from edgeglm.core.store import SENT_HOME, Store
from edgeglm.deploy.connection import Device
from edgeglm.engines.board import Board

_PATTERNS = (
    "bundle.finalized/receipt.json",
    "bundle.finalized/engines/*/engine.json",
    "bundle.finalized/engines/*/build.log",
    "bundle.finalized/engines/*/layers.json",
    "bundle.finalized/engines/*/timing.cache",
)
_ASKED_FOR = re.compile(
    r"bundle\.finalized/(receipt\.json|engines/[0-9A-Za-z_-]+/(engine\.json|build\.log|layers\.json|timing\.cache))"
)
_LIMIT_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The files of one finalize on one board, by their names below ``bundle.finalized/``."""

    device: str
    board: Board
    receipt: Mapping[str, Any]
    files: Mapping[str, bytes]

    @property
    def place(self) -> dict[str, Any]:
        """What makes it comparable: this kind of board with this version of the library."""
        library = [self.receipt["library"], self.receipt["library_version"]]
        return {"board": kind_of(self.board), "library": library}


@dataclass(frozen=True, kw_only=True)
class KeptEvidence:
    """One entry of the store. ``created`` is the receipt's, in ISO 8601; ``folder`` holds its files."""

    key: str
    place: Mapping[str, Any]
    content_digest: str
    created: str
    folder: Path


def kind_of(board: Board) -> dict[str, Any]:
    """Return what makes two boards one kind: chip, GPU and the release of their system."""
    return {**board.identity, "l4t": board.l4t}


async def evidence_from(
    device: Device, slot: str, name: str, board: Board, receipt: Mapping[str, Any]
) -> Evidence:
    """Fetch receipt, layer tables, logs and timing caches of a slot.

    Raises UserError for a name that was not asked for: what a device says is never a path here.
    """
    answer = await device.ask("read", slot=slot, patterns=_PATTERNS, limit=_LIMIT_BYTES)
    prefix = "bundle.finalized/"
    for path in (*answer["texts"], *answer["files"]):
        if not _ASKED_FOR.fullmatch(path):
            raise UserError(f"{name} sent a file {path!r} that nobody asked for; do not trust that device")
    files = {path: base64.b64decode(data) for path, data in answer["files"].items()}
    files.update({path: text.encode() for path, text in answer["texts"].items()})
    files = {path.removeprefix(prefix): data for path, data in files.items()}
    return Evidence(device=name, board=board, receipt=receipt, files=files)


def kept_evidence(evidence: Evidence, store: Store) -> Path:
    """Put evidence into the store, in place of what an earlier finalize of that bundle there had said."""
    said = {"content_digest": evidence.receipt["content_digest"], "created": evidence.receipt["created"]}
    key = sha256_json({"stage": SENT_HOME, **evidence.place, **said})

    def write(folder: Path) -> dict[str, Any]:
        for name, data in evidence.files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        (folder / "place.json").write_bytes(msgspec.json.encode(evidence.place))
        return {"key": evidence.place, "device": evidence.device, "measured": {}, **said}

    store.put(key, SENT_HOME, write)
    kept = evidence_in(store, kind=kind_of(evidence.board), receipt=evidence.receipt)
    same = [one for one in kept if one.content_digest == said["content_digest"]]
    for old in same[1:]:  # two devices may be here at once, and either may be the newer
        store.drop(old.key)
    return same[0].folder


def evidence_in(
    store: Store, *, kind: Mapping[str, Any] | None = None, receipt: Mapping[str, Any] | None = None
) -> list[KeptEvidence]:
    """Return what was kept, the newest first: of a kind of board, with the library of a receipt."""
    found = []
    for folder in (store.root / "entries").iterdir():
        try:
            data = (folder / "entry.json").read_bytes()
            if SENT_HOME.encode() not in data or (record := json.loads(data))["kind"] != SENT_HOME:
                continue
            said = record["provenance"]
            one = KeptEvidence(
                key=folder.name,
                place=said["key"],
                content_digest=said["content_digest"],
                created=said["created"],
                folder=folder / "files",
            )
        except (OSError, ValueError, KeyError):  # it is being written or dropped, or is of an older edgeglm
            continue
        library = None if receipt is None else [receipt.get("library"), receipt.get("library_version")]
        if kind in (None, one.place["board"]) and library in (None, one.place["library"]):
            found.append(one)
    return sorted(found, key=lambda one: (one.created, one.key), reverse=True)


def timing_caches(store: Store, board: Board, place: Path) -> dict[str, Path]:
    """Return ``{name below engines/: file}`` of what helps a first build on another board of that kind.

    Of each version of the library the newest; a version that is not the device's own is not used there. A
    timing cache travels with the record of its engine, which says what it is of. The files are links in
    ``place``: what is kept may be replaced while they travel, by the next device of the same deploy.
    """
    from edgeglm.bundle.receipt import ENGINE_RECORD, TIMING_CACHE

    found: dict[str, Path] = {}
    seen: list[Any] = []
    for kept in evidence_in(store, kind=kind_of(board)):
        caches = sorted(kept.folder.glob(f"engines/*/{TIMING_CACHE}"))
        if not caches or kept.place["library"] in seen:
            continue
        seen.append(kept.place["library"])
        for cache in caches:
            own = place / kept.key / cache.parent.name
            own.mkdir(parents=True)
            names = (TIMING_CACHE, ENGINE_RECORD)
            try:
                for name in names:
                    os.link(cache.with_name(name), own / name)
            except OSError:  # it has just been replaced, or has no record
                continue
            found |= {f"{own.name}/{name}": own / name for name in names}
    return found
