"""If these fail, a README shows figures that are not those of the published run."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

READMES = ("README.md", "README.zh-CN.md")


@pytest.fixture(scope="module")
def published(repository: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((repository / "docs/bench/build.json").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def figures(repository: Path) -> ModuleType:
    """scripts/readme-figures, which writes what is checked here."""
    loader = SourceFileLoader("readme_figures", str(repository / "scripts/readme-figures"))
    spec = importlib.util.spec_from_loader("readme_figures", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", READMES)
def test_every_row_is_that_of_the_published_build(
    name: str, published: dict[str, Any], figures: ModuleType, repository: Path
):
    text, language = (repository / name).read_text("utf-8"), READMES.index(name)
    for key, pair in figures.cells(published).items():
        begins = figures.ROWS[key][language]
        rows = [line for line in text.splitlines() if line.startswith(f"| {begins}")]
        assert len(rows) == 1, begins
        first, second = rows[0].removeprefix("| ").split(" | ")[:2]
        assert second == pair[language], begins
        assert first == figures.labels(published).get(key, (first, first))[language]


def test_the_figures_that_are_written_are_those_that_were_measured(
    published: dict[str, Any], figures: ModuleType
):
    found = figures.cells(published)
    ratio = {row["track"]: f"{row['ratio']['value']:.3f}" for row in published["tracks"]}
    assert found["catalogue"][0] == f"{ratio['catalogue-transductive']} / {ratio['catalogue-inductive']}"
    assert found["unseen"][1] == ratio["unseen"]
    times = published["latency_ms"]
    one, eight = (times["teacher"]["text"][batch] / times["fp32"]["text"][batch] for batch in ("1", "8"))
    assert found["text"][0] == f"{one:.1f} / {eight:.1f} times faster"
    keywords = published["pools"]["keywords"]
    assert found["keywords"][0].startswith(f"{keywords['value']:.3f} ({keywords['low']:.3f} to ")


@pytest.mark.parametrize("name", READMES)
def test_the_seconds_are_those_of_the_published_build(
    name: str, published: dict[str, Any], figures: ModuleType, repository: Path
):
    text = (repository / name).read_text("utf-8")
    cold, _ = figures.seconds(published)
    unit = "s" if name == "README.md" else "秒"
    assert len(re.findall(rf"\b{cold} {unit}", text)) == 2, "in the table and beside the two commands"


def test_the_transcript_is_of_the_published_content(published: dict[str, Any], repository: Path):
    assert f"digest   {published['content_digest']}" in (repository / "README.md").read_text("utf-8")


def test_the_transcript_is_what_the_published_run_said(repository: Path):
    said = repository / "docs/bench/build.txt"
    if said.exists():
        assert said.read_text("utf-8").strip("\n") in (repository / "README.md").read_text("utf-8")


def test_a_row_names_the_towers_that_were_measured(published: dict[str, Any], figures: ModuleType):
    student = {"image": {"detail": "edge-heir-s, 96 px"}, "text": {"detail": "edge-heir-s, 32 tokens"}}
    teacher = {"image": {"detail": "A, 128 px + B-C, 64 px"}, "text": {"detail": "MiniLM-L6 + LoRA 8"}}
    found = figures.labels({"towers": {"teacher": teacher, "student": student}})
    assert found["image"] == (
        "image tower: A at 128 px + B-C at 64 px against edge-heir-s at 96 px, batch 1 / 8",
        "图像塔：128 像素的 A + 64 像素的 B-C 对 96 像素的 edge-heir-s，批大小 1 / 8",  # noqa: RUF001
    )
    assert found["text"] == (
        "text tower: MiniLM-L6 against edge-heir-s, batch 1 / 8",
        "文本塔：MiniLM-L6 对 edge-heir-s，批大小 1 / 8",  # noqa: RUF001
    )
    row = "| image tower: old | 1 | 2 |"
    assert figures.with_row(row, "image tower:", "9", "new") == "| new | 9 | 2 |"


def test_a_row_that_is_gone_stops_the_writer(figures: ModuleType):
    assert (
        figures.with_row("| a row: x | 1 | 2 |\n| b | 3 | 4 |", "a row:", "9")
        == "| a row: x | 9 | 2 |\n| b | 3 | 4 |"
    )
    with pytest.raises(SystemExit, match="0 rows begin with 'c'"):
        figures.with_row("| a | 1 | 2 |", "c", "9")
