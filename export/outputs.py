"""Where a written model may go: anywhere but over what it is made from."""

from __future__ import annotations

from pathlib import Path

from edgeglm.core.errors import UserError


def require_other_file(out: Path, *inputs: Path) -> None:
    """Raise UserError if ``out`` is one of these files."""
    for given in inputs:
        same = out.resolve() == given.resolve()
        if same or (out.exists() and given.exists() and out.samefile(given)):
            raise UserError(f"{out} would be written over {given}; give another name")
