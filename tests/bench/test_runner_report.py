"""Figures that are published name the code that gave them, and what they are to be compared with."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, repository: Path) -> Any:
    monkeypatch.syspath_prepend(str(repository / "scripts" / "bench"))
    import runner_report

    return runner_report


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with one commit."""
    (tmp_path / "docs" / "bench").mkdir(parents=True)
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "docs" / "bench" / "runner.md").write_text("figures\n")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-q", "--no-gpg-sign", "-m", "one")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_figures_of_a_changed_tree_are_not_published_unless_asked(report, tree, tmp_path):
    published = tree / "docs" / "bench" / "runner"
    (tree / "docs" / "bench" / "runner.md").write_text("newer figures\n")  # a page of figures is no code
    report.check_publishable(tree, published, allow_dirty=False)
    (tree / "code.py").write_text("2\n")
    with pytest.raises(SystemExit, match="commit it, give an --output outside docs, or --allow-dirty"):
        report.check_publishable(tree, published, allow_dirty=False)
    report.check_publishable(tree, published, allow_dirty=True)
    report.check_publishable(tree, tmp_path.parent / "elsewhere", allow_dirty=False)


def test_a_bench_whose_figures_could_not_be_written_is_not_begun(report, tree):
    with pytest.raises(SystemExit, match="give an --output in one that is there"):
        report.check_publishable(tree, tree / "nowhere" / "runner", allow_dirty=True)


def test_a_soak_whose_books_disagree_with_the_callers_has_not_reached_its_aim(report, repository):
    import soak

    found = json.loads((repository / "docs" / "bench" / "soak.json").read_text())
    row = "| lost, duplicated, wrong | 0, 0, 0 | 0, 0, 0 | {} |"
    assert row.format("reached") in soak.markdown(found)
    odd = soak.markdown({**found, "books": "disagree with the callers: {}"})
    assert row.format("falls short: the books disagree") in odd


def test_a_row_to_compare_with_has_no_result_and_the_others_have_theirs(report):
    rounds = SimpleNamespace(best=lambda: [0, 1, 2], others=lambda: 0.0)
    reaches = {"floor": (None, None), "slow": (3, 2), "good": (4, 2), "best": (9, 8)}
    rows = [
        {**report.row(name, "us", [3.0, 4.0, 5.0], *reach, "", rounds), "commit": "abc"}
        for name, reach in reaches.items()
    ]
    assert [row["result"] for row in rows] == ["to compare with", "falls short", "reached", "beyond"]
    assert (
        report.row("r", "ratio", [0.9], 0.8, 0.9, "", SimpleNamespace(best=lambda: [0], others=lambda: 0.0))[
            "result"
        ]
        == "beyond"
    )
    head = {"machine": "", "python": "", "onnxruntime": "", "command": ""}
    page = report.markdown({**head, "rows": rows}, {"slow": "why", "good": "not shown"})
    assert "| floor | 4 | 3: 3 to 5 |  |  | to compare with |" in page
    assert "| slow | 4 | 3: 3 to 5 | <= 3 | <= 2 | falls short |" in page
    assert "**slow** falls short. Why" in page
    assert "not shown" not in page


def test_the_bare_way_into_a_thread_and_back_answers_each_caller(report):
    import runner_overhead

    async def main() -> None:
        with runner_overhead.BareThread() as thread:
            await asyncio.gather(*(thread.ask() for _ in range(100)))
            assert await runner_overhead.median_us(thread.ask, 10) > 0
        assert not thread._thread.is_alive()

    asyncio.run(asyncio.wait_for(main(), 20))
