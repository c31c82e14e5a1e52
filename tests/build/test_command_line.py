"""The command line that a report shows gives the very recipe of the bundle."""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch", reason="the host half is not installed")

from click.testing import CliRunner

from edgeglm.build.command_line import command_of
from edgeglm.build.pack_manifest import portable_recipe
from edgeglm.build.shipped import load_recipe
from edgeglm.build.student_budget import Asked, Budget, budget_of
from edgeglm.build.student_choice import undecided
from edgeglm.build.student_search import TRIALS
from edgeglm.cli import build
from edgeglm.cli.build import resolved_recipe
from edgeglm.core.recipe import Recipe, recipe_from_toml


@pytest.mark.parametrize(
    ("name", "overrides", "data", "skip_bad", "expected"),
    [
        ("default", (), None, False, ""),
        ("chinese", (), None, False, " --recipe chinese"),
        ("default", ("student.size=edge-xs", "seed=7"), None, False,
         " --set seed=7 --set student.size=edge-xs"),
        ("default", (), "shop folder", True, " --data 'shop folder' --skip-bad"),
        ("ensemble", ("gates.judge=value",), "shop.parquet", False,
         " --recipe ensemble --data shop.parquet --set gates.judge=value"),
        ("default", ('quantize.candidates=["fp16"]', 'teacher.text="12"'), None, False, None),
    ],
)  # fmt: skip
def test_a_recipe_gives_a_command_line_that_gives_it_again(
    name: str,
    overrides: tuple[str, ...],
    data: str | None,
    skip_bad: bool,
    expected: str | None,
    tmp_path: Path,
) -> None:
    place = None if data is None else tmp_path / data
    recipe = portable_recipe(resolved_recipe(name, overrides, place, skip_bad))
    command = command_of(recipe, "jetson-agx")
    if expected is not None:
        assert command == f"edgeglm build --target jetson-agx{expected}"
    assert str(tmp_path) not in command
    assert _recipe_of(command) == recipe


@pytest.mark.parametrize(
    ("name", "overrides", "fixed", "expected"),
    [
        ("default", (), False, " --latency-budget 2.5ms --memory-budget 20MB"),
        ("unlabelled", ("seed=7",), False,
         " --recipe unlabelled --latency-budget 2.5ms --memory-budget 20MB --set seed=7"),
        ("default", (), True, " --latency-budget 2.5ms --memory-budget 20MB --set student.resolution=64"),
    ],
)  # fmt: skip
def test_a_budget_is_asked_for_again(
    name: str, overrides: tuple[str, ...], fixed: bool, expected: str
) -> None:
    before = load_recipe(name, overrides)
    student = msgspec.structs.replace(before.student, size="b6c32-f32w96l1", resolution=64 if fixed else 48)
    chosen = msgspec.structs.replace(before, student=student)
    budget = Budget(latency_ms=2.5, memory_bytes=20e6)
    asked = Asked(budget=budget, trials=TRIALS, resolution=64, fixed=fixed)
    command = command_of(chosen, "cpu", asked)
    assert command == f"edgeglm build --target cpu{expected}"
    assert undecided(_recipe_of(command)) == undecided(portable_recipe(before))


@pytest.mark.parametrize("spelt", [("1500us", None), ("0.01 s", "2MiB"), (None, "1"), ("0.3us", "1.1kb")])
def test_a_budget_is_written_as_it_is_read(spelt: tuple[str | None, str | None]) -> None:
    budget = budget_of(*spelt)
    assert budget is not None
    words = Asked(budget=budget, trials=5, resolution=64, fixed=False).options(usual_trials=TRIALS)
    told = dict(zip(words[::2], words[1::2], strict=True))
    assert told.pop("--trials") == "5"
    assert budget_of(told.get("--latency-budget"), told.get("--memory-budget")) == budget


def test_a_recipe_file_with_another_side_than_the_chosen_gives_the_chosen_student() -> None:
    recipe = load_recipe("default", [f"teacher.{key}=3" for key in ("epochs", "warmup_epochs", "views")])
    student = msgspec.structs.replace(recipe.student, resolution=72, image_epochs=3, text_epochs=3, anchors=3)
    recipe = msgspec.structs.replace(recipe, student=student, seed=3)
    asked = Asked(budget=Budget(latency_ms=9.0), trials=5, resolution=96, fixed=False)
    plain = "edgeglm build --target cpu --recipe recipe.toml"
    assert command_of(recipe, "cpu", asked) == plain
    same = msgspec.structs.replace(asked, resolution=72)
    assert command_of(recipe, "cpu", same) == f"{plain} --latency-budget 9ms --trials 5"
    fixed = msgspec.structs.replace(same, fixed=True)
    assert command_of(recipe, "cpu", fixed).startswith("edgeglm build --target cpu --latency-budget 9ms")


def test_a_recipe_far_from_every_shipped_one_is_given_by_the_file_in_the_bundle() -> None:
    text = """
[teacher]
hidden = 64
epochs = 2
batch_size = 32
views = 1
lora_epochs = 0
[student]
resolution = 48
image_epochs = 2
text_epochs = 3
[pack]
goldens = 3
"""
    recipe = recipe_from_toml(text, origin="a test")
    assert command_of(recipe, "cpu") == "edgeglm build --target cpu --recipe recipe.toml"


def test_what_set_cannot_take_away_is_given_by_the_file_in_the_bundle() -> None:
    recipe = Recipe(data=msgspec.structs.replace(Recipe().data, target=None))
    assert command_of(recipe, "cpu") == "edgeglm build --target cpu --recipe recipe.toml"


def _recipe_of(command: str) -> Recipe:
    """Read a command line as edgeglm does, and return its recipe with the last part of each path."""
    found: dict[str, Recipe] = {}

    class StoppedError(Exception):
        """Nothing is built."""

    def keep(*given: object) -> Recipe:
        found["recipe"] = resolved_recipe(*given)  # type: ignore[arg-type]
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "resolved_recipe", keep)
        done = CliRunner().invoke(build.command, shlex.split(command)[2:])
    assert isinstance(done.exception, StoppedError), done.output
    return portable_recipe(found["recipe"])
