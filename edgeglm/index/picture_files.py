"""The pictures of a folder, what they are called in an index, and what else is said of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.core.errors import UserError
from edgeglm.data.tokenization import is_unicode

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """A picture of a folder. ``stamp`` changes with its size and its time of change."""

    id: str
    path: Path
    stamp: str
    metadata: dict[str, Any]


def picture_files(folder: Path, *, prefix: str | None = None) -> Iterator[PictureFile | tuple[str, str]]:
    """Walk a folder, sorted; links are not followed.

    Args:
        folder: Or one picture file.
        prefix: First part of the ids; the folder's own name for None, nothing for "".

    Yields:
        Pictures by their suffix, or (reason, which) for what cannot be taken.

    Raises:
        UserError: There is no such folder, or its ids would begin with what is no Unicode.
    """
    if not folder.exists():
        raise UserError(f"there is no folder at {folder}; give a folder of pictures")
    root = folder if folder.is_dir() else folder.parent
    before = first_part(folder, prefix)
    for path in _files(folder):
        if isinstance(path, OSError):
            shown = os.fsencode(path.filename).decode("utf-8", "replace")
            yield "unreadable", f"{shown}: {path.strerror}"
            continue
        if path.suffix.lower() not in SUFFIXES:
            continue
        name = path.relative_to(root).as_posix()
        shown = os.fsencode(path).decode("utf-8", "replace")
        try:
            name.encode()
        except UnicodeEncodeError:
            yield "name is not UTF-8", f"{shown}: its name is not UTF-8"
            continue
        if path.is_symlink():
            yield "link", f"{shown}: a symbolic link"
            continue
        try:
            found = path.stat()
        except OSError as error:
            yield "unreadable", f"{shown}: {error.strerror}"
            continue
        if found.st_size > MAX_FILE_BYTES:
            yield "too large", f"{shown}: {found.st_size} bytes"
            continue
        parent = path.relative_to(root).parent.as_posix()
        yield PictureFile(
            id=f"{before}/{name}" if before else name,
            path=path,
            stamp=f"{found.st_size}-{found.st_mtime_ns}",
            metadata={
                "name": path.name,
                "folder": before if parent == "." else (f"{before}/{parent}" if before else parent),
                "kind": path.suffix.lower().lstrip("."),
                "bytes": found.st_size,
                "modified": round(found.st_mtime, 3),
            },
        )


def first_part(folder: Path, prefix: str | None) -> str:
    """Return what the ids of a folder's pictures begin with, without a slash at its end.

    Raises UserError for what cannot be written as UTF-8.
    """
    found = prefix if prefix is not None else (folder.resolve().name if folder.is_dir() else "")
    if is_unicode(found):
        return "/".join(part for part in found.split("/") if part)
    what = "the name of the folder" if prefix is None else "the prefix"
    shown = found.encode("utf-8", "replace").decode()
    raise UserError(f"{what}, {shown}, is not UTF-8 and no id can begin with it; give another --prefix")


def metadata_from_jsonl(path: Path) -> dict[str, dict[str, Any]]:
    """Read ``{"image": "path/in/the/folder.png", ...}`` lines; return the other fields by picture.

    Raises UserError with the line that is wrong.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a JSON Lines file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = msgspec.json.decode(line, type=dict[str, Any])
            name = fields.pop("image")
            if not isinstance(name, str):
                raise ValueError("'image' is no text")
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"{name[:100]!r} leads out of the folder")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, ValueError) as error:
            raise UserError(
                f'{path} line {number}: {error}; write {{"image": "a.png", "text": "..."}}'
            ) from error
        found[name] = fields
    return found


def known_folder(picture: Path, ids: Iterable[str]) -> str | None:
    """Return the prefix under which an index has the folder of a picture, None if it has it not.

    The longest way down to the picture that is a folder of some id counts.
    """
    folders = {""}
    for id in ids:
        folder = id.rpartition("/")[0]
        while folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    parts = picture.resolve().parent.parts[1:]
    ways = ("/".join(parts[at:]) for at in range(len(parts)))
    return next((way for way in ways if way in folders), None)


def _files(folder: Path) -> Iterator[Path | OSError]:
    """Yield the files, and an error for each folder that cannot be listed."""
    if folder.is_file():
        yield folder
        return
    errors: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=errors.append):
        folders.sort()
        for name in sorted(names):
            yield Path(place) / name
    yield from errors
