"""If these fail, a README shows figures that are not those of the published run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def published(repository: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((repository / "docs/bench/build.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_ratios_are_those_of_the_published_build(name: str, published: dict[str, Any], repository: Path):
    text = (repository / name).read_text("utf-8")
    ratio = {row["track"]: f"{row['ratio']['value']:.3f}" for row in published["tracks"]}
    assert f"| {ratio['catalogue-transductive']} / {ratio['catalogue-inductive']} |" in text
    assert f"| {ratio['unseen']} |" in text
    keywords = (f"{track}-keywords" for track in ("catalogue-transductive", "catalogue-inductive", "unseen"))
    assert f"| {' / '.join(ratio[track] for track in keywords)} |" in text
    for pool in ("names, all tracks", "keywords, all tracks"):
        whole = published["pools"][pool]
        assert f"| {whole['value']:.3f} ({whole['low']:.3f} to {whole['high']:.3f}) |" in text
    teacher = {row["track"]: f"{row['teacher']['value']:.3f}" for row in published["tracks"]}
    assert f"| {teacher['catalogue-transductive']} / {teacher['catalogue-inductive']} |" in text


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_speeds_are_those_of_the_published_build(name: str, published: dict[str, Any], repository: Path):
    text, times = (repository / name).read_text("utf-8"), published["latency_ms"]
    for tower in ("image", "text"):
        one, eight = (times["teacher"][tower][batch] / times["fp32"][tower][batch] for batch in ("1", "8"))
        assert f"{one:.1f} / {eight:.1f} " in text


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_seconds_are_those_of_the_published_build(name: str, published: dict[str, Any], repository: Path):
    text = (repository / name).read_text("utf-8")
    seconds = {row["what"]: row["measured"].removesuffix(" s") for row in published["rows"]}
    cold, warm = seconds["cold build, jetson-agx"], seconds["nothing changed"]
    unit = "s" if name == "README.md" else "秒"
    assert f"| {cold} {unit} / {warm} {unit} |" in text
    assert text.count(f"{cold} {unit}") == 2  # also beside the two commands


def test_the_transcript_is_of_the_published_content(published: dict[str, Any], repository: Path):
    assert f"digest   {published['content_digest']}" in (repository / "README.md").read_text("utf-8")
