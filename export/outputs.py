"""Where a written model may go: anywhere that can be written but over what it is made from."""

from __future__ import annotations

from pathlib import Path

from edgeglm.core.errors import UserError


def write_file(path: Path, content: bytes) -> Path:
    """Write a file, and its folder. Raises UserError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose a folder that can be "
            "written"
        ) from error
    return path


def require_other_file(out: Path, *inputs: Path) -> None:
    """Raise UserError if ``out`` is one of these files."""
    for given in inputs:
        same = out.resolve() == given.resolve()
        if same or (out.exists() and given.exists() and out.samefile(given)):
            raise UserError(f"{out} would be written over {given}; give another name")
