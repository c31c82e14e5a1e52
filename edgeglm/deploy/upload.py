"""Files onto a device, in as few bytes as it takes.

None that is there; the rest of what was cut off; small ones deflated; and of a manifest whose former one
lies there only the lines that changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import UserError
from edgeglm.deploy.connection import Device

_CHUNK_BYTES = 1 << 18
_SMALL_BYTES = 1 << 20
_WORTH = 0.9
"""A file that deflates to less than this share of itself travels deflated."""

Moved = Callable[[int], None]


async def send_files(
    device: Device, missing: Sequence[Mapping[str, Any]], objects: Mapping[str, Path], moved: Moved
) -> int:
    """Send what is missing, the rest of each where some came before; return how many files went.

    Args:
        device: The device, which holds the lock.
        missing: ``{sha256, have, part}`` of each, as the device says.
        objects: Where each lies here.
        moved: Is told how many bytes of the files are there now, as they lie here.

    Raises:
        UserError, ConnectionLostError: what came through counts the next time.
    """
    if not missing:
        return 0
    await device.ask_for_files()
    for one in missing:
        digest, have = one["sha256"], int(one["have"])
        path = objects[digest]
        try:
            left = path.stat().st_size - have
            for part in _parts(digest, path, have, str(one["part"])):
                await device.write(part)
                step = min(len(part), left)
                left -= step
                moved(step)
        except FileNotFoundError as error:
            raise _changed(path) from error
        moved(left)  # what was deflated away
    return await device.files_sent()


async def send_text(device: Device, data: bytes, *, base: bytes | None = None) -> None:
    """Send one small text whole, or as what differs from ``base``, which must lie there."""
    digest = sha256_bytes(data)
    header: dict[str, Any] = {"sha256": digest, "deflated": True}
    body = zlib.compress(data, 9)
    if base is not None:
        changed = zlib.compress(json.dumps(line_recipe(base, data), separators=(",", ":")).encode(), 9)
        if len(changed) < len(body):
            header, body = {"sha256": digest, "base": sha256_bytes(base)}, changed
    await device.ask_for_files()
    await device.write(json.dumps({**header, "length": len(body)}).encode() + b"\n" + body)
    await device.files_sent()


def line_recipe(base: bytes, new: bytes) -> list[Any]:
    """Return how to make ``new`` of the lines of ``base``: ``[first, count]`` copies, text is new.

    Greedy: each run begins at the line that follows the former run if it fits, else at the first equal one.
    """
    places: dict[bytes, int] = {}
    lines = base.splitlines(keepends=True)
    for number, line in enumerate(lines):
        places.setdefault(line, number)
    recipe: list[Any] = []
    following = 0
    for line in new.splitlines(keepends=True):
        place = following if following < len(lines) and lines[following] == line else places.get(line)
        if place is None:
            text = line.decode("utf-8", "surrogateescape")
            if recipe and isinstance(recipe[-1], str):
                recipe[-1] += text
            else:
                recipe.append(text)
            following += 1  # a changed line stands where the old one stood
        else:
            if recipe and not isinstance(recipe[-1], str) and sum(recipe[-1]) == place:
                recipe[-1][1] += 1
            else:
                recipe.append([place, 1])
            following = place + 1
    return recipe


def _parts(digest: str, path: Path, have: int, part: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if have and (have > size or _sha256_of(file, have) != part):
            have = 0  # what came is damaged there, and goes anew
        if size <= _SMALL_BYTES and not have:
            file.seek(0)
            data = file.read()
            packed = zlib.compress(data, 6)
            if len(packed) < _WORTH * size:
                header = {"sha256": digest, "deflated": True, "length": len(packed)}
                yield json.dumps(header).encode() + b"\n" + packed
                return
        header = {"sha256": digest, "offset": have, "length": size - have}
        yield json.dumps(header).encode() + b"\n"
        file.seek(have)
        while have < size:
            chunk = file.read(min(_CHUNK_BYTES, size - have))
            if not chunk:
                raise _changed(path)
            have += len(chunk)
            yield chunk


def _sha256_of(file: BinaryIO, size: int) -> str:
    """Return the digest of the first ``size`` bytes of a file."""
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(_CHUNK_BYTES, size))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _changed(path: Path) -> UserError:
    return UserError(f"{path} was replaced or shortened while it travelled; deploy again when it is finished")
