"""Files by digest: what is there, what is missing, and what came so far of what was cut off."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeglm.deploy.device.layout import SLOTS, Layout, read_json
from edgeglm.deploy.device.wire import Refused, Wire

_HEX = frozenset("0123456789abcdef")
_CHUNK_BYTES = 1 << 20
_MAX_WHOLE_BYTES = 64 << 20
_FORGET_INCOMING_SECONDS = 7 * 86400


def object_path(layout: Layout, digest: str) -> Path:
    """Return where the object of a digest lies. Raises Refused for what is no sha256."""
    if len(digest) != 64 or not set(digest) <= _HEX:
        raise Refused(f"{digest!r} is no sha256; use the same version of edgeglm on both sides")
    return layout.objects / digest


def missing(layout: Layout, wanted: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    """Return ``{sha256, have, part}`` of the (sha256, size) that are not here.

    ``have`` counts bytes that came, and ``part`` is their own sha256: a power cut may have damaged them.

    What is here is read and hashed: a damaged object is a missing one.
    """
    lacking = []
    for digest, size in dict(wanted).items():
        path = object_path(layout, digest)
        if path.exists():
            if path.stat().st_size == size and _sha256(path) == digest:
                continue
            path.unlink()
        part = layout.incoming / digest
        have = part.stat().st_size if part.exists() else 0
        if have > size:
            part.unlink()
            have = 0
        lacking.append({"sha256": digest, "have": have, "part": _sha256(part) if have else ""})
    return lacking


def manifests(layout: Layout) -> list[str]:
    """Return the digests of the slots' manifests that lie here undamaged."""
    named = {str(sha) for slot in SLOTS if (sha := layout.record(slot).get("manifest_sha256"))}
    return sorted(
        one for one in named if (path := object_path(layout, one)).exists() and _sha256(path) == one
    )


def receive(layout: Layout, wire: Wire) -> int:
    """Take files until the sender says that was all; return how many. Each is hashed before it counts.

    A header line is ``{"sha256", "length"}`` with ``"offset"`` (the rest of a file), ``"deflated"`` (the
    whole of a small one) or ``"base"`` (lines of another object and new ones). Raises SenderGone.
    """
    count = 0
    while (header := wire.receive()) is not None:
        if header.get("end"):
            return count
        digest, length = header["sha256"], int(header["length"])
        path, part = object_path(layout, digest), layout.incoming / header["sha256"]
        if "base" in header:
            data = _patched(object_path(layout, header["base"]), _inflated(wire.exactly(length)))
            part.write_bytes(data)
        elif header.get("deflated"):
            part.write_bytes(_inflated(wire.exactly(length)))
        else:
            with part.open("ab") as file:
                file.truncate(int(header.get("offset", 0)))
                while length:
                    chunk = wire.chunk(length)
                    file.write(chunk)
                    length -= len(chunk)
        _keep(part, path, digest)
        count += 1
    return count


def linked(source: Path, place: Path) -> None:
    """Let ``place`` be the same file as ``source``, or a copy where links cannot be."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def collect(layout: Layout, *, coming: str | None = None) -> dict[str, int]:
    """Remove what nobody goes back to or waits for: the slot before the former one, and what no slot needs.

    Objects, environments and old beginnings, that is. What serves, a staged bundle and the slot ``coming``
    are never touched. Where the record of a slot cannot be read, nobody knows what that slot needs, and
    nothing is removed.
    """
    keep: set[str] = set()
    environments: set[str] = set()
    for slot in SLOTS:
        used = slot in (layout.pointed("current"), layout.pointed("previous"), coming)
        if not used and layout.record(slot).get("state") != "staged":
            remove_tree(layout.slots / slot)
    if damaged_slots(layout):
        return {"removed": 0, "bytes": 0}
    for slot in SLOTS:
        record = layout.record(slot)
        keep |= set(record.get("objects", ()))
        if record.get("environment"):
            environments.add(record["environment"])
        with suppress(OSError):  # what a slot runs in is kept by the link that it runs by, too
            environments.add((layout.slots / slot / "environment").readlink().name)
    for name in environments:
        keep |= set(read_json(layout.environments / name / "complete.json").get("objects", ()))
    removed = freed = 0
    for path in layout.objects.iterdir():
        if path.name not in keep:
            freed += path.stat().st_size
            path.unlink()
            removed += 1
    for folder in layout.environments.iterdir():
        if folder.name not in environments:
            (folder / "complete.json").unlink(missing_ok=True)  # first: half of it is not complete
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    for place in layout.root.glob(".wheels-*"):  # an installation that a power cut ended
        remove_tree(place)
    for part in layout.incoming.iterdir():
        if time.time() - part.stat().st_mtime > _FORGET_INCOMING_SECONDS:
            part.unlink()
            removed += 1
    return {"removed": removed, "bytes": freed}


def damaged_slots(layout: Layout) -> list[str]:
    """Return the slots that hold something and do not say what it needs."""
    return [s for s in SLOTS if (layout.slots / s).is_dir() and "objects" not in layout.record(s)]


def patched_text(base: list[bytes], recipe: Iterable[Any]) -> bytes:
    """Return the lines of ``base`` and new ones as ``recipe`` says: ``[first, count]`` or text."""
    parts = []
    for step in recipe:
        if isinstance(step, str):
            parts.append(step.encode("utf-8", "surrogateescape"))
        else:
            first, count = step
            parts += base[first : first + count]
    return b"".join(parts)


def _patched(base: Path, recipe: bytes) -> bytes:
    return patched_text(base.read_bytes().splitlines(keepends=True), json.loads(recipe))


def _inflated(data: bytes) -> bytes:
    engine = zlib.decompressobj()
    whole = engine.decompress(data, _MAX_WHOLE_BYTES)
    if engine.unconsumed_tail:
        raise Refused("a small file grew beyond all bounds; use the same version of edgeglm on both sides")
    return whole


def _keep(part: Path, path: Path, digest: str) -> None:
    actual = _sha256(part)
    if actual != digest:
        part.unlink()
        raise Refused(f"{digest} came as {actual}: it was altered on the way or at home; deploy again")
    part.chmod(0o444)
    part.replace(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def wanted_files(manifest: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Return ``{name: (sha256, size)}`` of a bundle's manifest, whose names are held to stay inside."""
    found = {}
    for name, record in manifest["files"].items():
        found[inside(name)] = (str(record["sha256"]), int(record["size"]))
    return found


def inside(name: str) -> str:
    """Return the name of a file that stays below its folder. Raises Refused for any other."""
    parts = name.split("/")
    if name.startswith("/") or any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise Refused(
            f"the manifest names {name!r}, which leads out of the bundle; get the bundle again from its maker"
        )
    return name


def remove_tree(path: Path) -> None:
    """Remove a folder that may not be there, read-only parts included."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path)
