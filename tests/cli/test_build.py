"""What `edgeglm build` writes to a terminal; what it does is tested in tests/build."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.build.shipped import known_recipes
from edgeglm.build.table import Row
from edgeglm.cli import main as cli
from edgeglm.cli.build import resolved_recipe, row_line
from edgeglm.evaluate.retrieval import Interval, TrackMetrics


def metrics(value: float, queries: int = 10) -> TrackMetrics:
    return TrackMetrics(
        map10=Interval(value=value, low=value, high=value),
        r1=value / 2,
        r10=value,
        r1_i2t=value / 4,
        r10_i2t=value,
        queries=queries,
        gallery=20,
    )


def test_a_row_shows_time_figures_and_size() -> None:
    row = Row(
        title="Teacher", seconds=12.34, reused=False, metrics={"catalogue": metrics(0.6)}, size_bytes=10
    )
    cells = row_line(row).split()
    assert cells[:5] == ["Teacher", "12.3", "s", "0.600", "-"]
    assert cells[-4:] == ["-", "-", "10", "B"], "neither latency was measured"
    assert "left out" not in row_line(row)


def test_a_row_shows_the_milliseconds_of_both_towers_together() -> None:
    latency = {"image": {"1": 4.74, "8": 25.0}, "text": {"1": 3.62, "8": 16.11}}
    row = Row(title="Teacher", seconds=1.0, reused=False, metrics={}, latency=latency)
    assert row_line(row).split()[-3:-1] == ["8.4", "41.1"]


def test_a_row_that_is_not_evaluated_says_what_it_made() -> None:
    row = Row(title="Engines", seconds=8.0, reused=False, metrics={}, note="4 built here", size_bytes=1000)
    assert row_line(row).endswith("1.0 kB  4 built here")


def test_a_reused_row_shows_no_time_of_its_own() -> None:
    line = row_line(Row(title="Teacher", seconds=12.3, reused=True, metrics={"unseen": metrics(0.5)}))
    assert line.split()[1:4] == ["reused", "-", "0.500"]


def test_a_candidate_left_out_says_why() -> None:
    row = Row(title="INT8", seconds=0.0, reused=False, metrics={}, kept=False, note="kept 0.97 of FP32")
    assert row_line(row).endswith("left out: kept 0.97 of FP32")


def test_ones_own_data_takes_its_name_from_the_folder(tmp_path) -> None:
    recipe = resolved_recipe("default", ("student.size=edge-xs",), tmp_path / "shop.parquet")
    assert (recipe.name, recipe.data.source, recipe.student.size) == ("shop", "parquet", "edge-xs")


def test_the_resolved_recipe_of_a_dry_run_can_be_read_again(
    capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    from edgeglm.core.recipe import recipe_from_toml

    assert cli.exit_code(["build", "--target", "t4", "--dry-run", "--set", "seed=7"]) == 0
    text = capsys.readouterr().out.partition("\nstages: ")[0]
    assert recipe_from_toml(text, origin="dry run") == resolved_recipe("default", ("seed=7",))


def test_passes_that_towers_trained_together_do_not_take_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["build", "--target", "t4", "--dry-run"]
    assert cli.exit_code(asked) == 0
    assert "not read" not in capsys.readouterr().err
    assert cli.exit_code([*asked, "--set", "student.losses.labels=1"]) == 0
    assert "student.text_epochs: not read, as student.losses trains both" in capsys.readouterr().err


def test_the_help_names_every_shipped_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"chinese", "default", "ensemble"} <= set(known_recipes())
    for command in ("build", "explain"):
        assert cli.exit_code([command, "--help"]) == 0
        words = " ".join(capsys.readouterr().out.split())
        assert f"A shipped recipe ({', '.join(known_recipes())})" in words


@pytest.mark.parametrize("name", known_recipes())
def test_every_shipped_recipe_resolves(name: str) -> None:
    recipe = resolved_recipe(name, ())
    assert recipe.name == name
    assert recipe.description
