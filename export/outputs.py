"""Where a written model may go: anywhere that can be written but over what it is made from."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from edgeglm.core.errors import UserError

_LONGEST = 64  # of a file's name, in that of its unfinished twin


def write_file(path: Path, content: bytes) -> Path:
    """Write a file, and its folder: what was there before stays until the new one is whole.

    A link is followed, and what is no file, such as ``/dev/null``, is written to. Raises UserError where it
    cannot be done.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            _replace(path.resolve(), content)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose a folder that can be "
            "written"
        ) from error
    return path


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name[:_LONGEST]}.{uuid.uuid4().hex}")
    try:
        with new.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def require_other_file(out: Path, *inputs: Path) -> None:
    """Raise UserError if ``out`` is one of these files."""
    for given in inputs:
        same = out.resolve() == given.resolve()
        if same or (out.exists() and given.exists() and out.samefile(given)):
            raise UserError(f"{out} would be written over {given}; give another name")
