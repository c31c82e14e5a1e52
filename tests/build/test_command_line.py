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
