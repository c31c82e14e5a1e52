"""Files onto a device, in as few bytes as it takes.

None that is there; the rest of what was cut off; small ones deflated; and of a manifest whose former one
lies there only the lines that changed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeglm.core.digest import sha256_bytes
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
        missing: ``{sha256, have}`` of each, as the device says.
        objects: Where each lies here.
        moved: Is told how many bytes have gone.

    Raises:
        UserError, ConnectionLostError: what came through counts the next time.
    """
    if not missing:
        return 0
    await device.ask_for_files()
    for one in missing:
        digest = one["sha256"]
        for part in _parts(digest, objects[digest], int(one["have"])):
            await device.write(part)
            moved(len(part))
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


def _parts(digest: str, path: Path, have: int) -> Iterator[bytes]:
    size = path.stat().st_size
    if size <= _SMALL_BYTES and not have:
        data = path.read_bytes()
        packed = zlib.compress(data, 6)
        if len(packed) < _WORTH * size:
            header = {"sha256": digest, "deflated": True, "length": len(packed)}
            yield json.dumps(header).encode() + b"\n" + packed
            return
    header = {"sha256": digest, "offset": have, "length": size - have}
    yield json.dumps(header).encode() + b"\n"
    with path.open("rb") as file:
        file.seek(have)
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
