"""If these fail, the table of aims shows figures that are not those of the benches, or praises a miss."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def aims(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts/bench"))
    return importlib.import_module("transfer_aims")


def test_the_page_is_what_the_benches_figures_make(aims: ModuleType, repository: Path):
    folder = repository / "docs/bench"
    assert (folder / "transfer_aims.md").read_text("utf-8") == aims.page(folder)


@pytest.mark.parametrize(
    ("value", "less", "said"),
    [
        (0.64, False, "**missed**"),
        (0.65, False, "reached"),
        (0.75, False, "beyond"),
        (0.76, True, "**missed**"),
        (0.74, True, "reached"),
    ],
)
def test_a_row_that_falls_short_says_so(aims: ModuleType, value: float, less: bool, said: str):
    beyond = None if less else 0.75
    reach = 0.75 if less else 0.65
    aim = aims.Aim(what="it", measured="", value=value, reach=reach, beyond=beyond, page="adapt", less=less)
    assert aim.verdict == said
