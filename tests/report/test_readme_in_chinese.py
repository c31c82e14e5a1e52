"""If these fail, a reader of the Chinese page is told other figures, or sent to pages that do not exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", CHINESE)
    assert "README.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_measured_figure_is_the_one_of_the_english_page() -> None:
    rows = [line for line in CHINESE.splitlines() if line.startswith("| ")]
    figures = {figure for row in rows for figure in re.findall(r"\d[\d,.]*\d", row)}
    assert len(figures) > 20
    assert sorted(figure for figure in figures if figure not in ENGLISH) == []


def test_every_command_is_one_that_the_english_page_or_the_guide_shows() -> None:
    told = ENGLISH + (ROOT / "docs" / "adapting.md").read_text()
    verbs = set(re.findall(r"^(?:edgeglm|scripts/)\s?\w+", CHINESE, flags=re.MULTILINE))
    assert len(verbs) >= 10
    assert sorted(verb for verb in verbs if verb not in told) == []
