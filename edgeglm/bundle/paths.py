"""Which names a file inside a bundle may have: those that mean the same file on every system."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from edgeglm.core.errors import UserError

MAX_NAME_BYTES = 150  # what a plain ustar header can always hold, with parts of at most 100 bytes
_MAX_PART_BYTES = 100
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))})
_FORBIDDEN = frozenset('\\:*?"<>|')


def name_problem(name: str) -> str | None:
    """Say what is wrong with a relative posix path from an untrusted source, or None if nothing is.

    Absolute paths, ``..``, ``.``, empty parts, control characters and names that some file system
    reads differently (backslash, colon, trailing dot, device names) are all problems.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not 0 < len(encoded) <= MAX_NAME_BYTES:
        return f"has {len(encoded)} bytes where 1 to {MAX_NAME_BYTES} are allowed"
    if name.startswith("/"):
        return "is an absolute path"
    if not (name.isascii() and name.isprintable() and _FORBIDDEN.isdisjoint(name)):  # most are all of it
        if unicodedata.normalize("NFC", name) != name:
            return "is not in Unicode normal form C"
        for character in name:
            if character in _FORBIDDEN or unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
                return f"holds the character {character!r}"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "climbs out of the bundle" if part == ".." else "has an empty part"
        if len(part.encode()) > _MAX_PART_BYTES:
            return f"has a part of more than {_MAX_PART_BYTES} bytes"
        if part[-1] in ". " or part.split(".")[0].casefold() in _DEVICES:
            return f"has the part {part!r}, which some systems read as another file"
    return None


def check_names(names: Iterable[str], origin: str) -> None:
    """Raise UserError unless all ``names`` are safe and stay apart on every file system.

    Two names collide when they differ only in case, or when one is a folder of the other.
    """
    folded: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        check_name(name, origin)
        key = name.casefold()
        if key in folded:
            what = "twice" if folded[key] == name else f"beside {folded[key]!r}, which differs only in case"
            raise UserError(f"{origin} has {name!r} {what}; get the bundle again from its maker")
        folded[key] = name
        parts = key.split("/")
        for depth in range(1, len(parts)):
            folders.setdefault("/".join(parts[:depth]), name)
    for key in folded.keys() & folders.keys():
        raise UserError(
            f"{origin} has {folded[key]!r} both as a file and as the folder of {folders[key]!r}; "
            "get the bundle again from its maker"
        )


def check_name(name: str, origin: str) -> None:
    """Raise UserError unless ``name`` is a safe relative path."""
    if (problem := name_problem(name)) is not None:
        raise UserError(f"{origin}: the path {name!r} {problem}; get the bundle again from its maker")


def inside(root: Path, name: str) -> Path:
    """Join a checked name to ``root``. Raises ValueError for a name that was not checked."""
    if (problem := name_problem(name)) is not None:
        raise ValueError(f"{name!r} {problem}")
    return root.joinpath(*name.split("/"))
