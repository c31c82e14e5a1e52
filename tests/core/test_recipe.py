from __future__ import annotations

import contextlib
import json
import string
from pathlib import Path

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.core.recipe import (
    DataConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    recipe_from_file,
    recipe_from_toml,
    toml_tree,
)

_words = st.text(string.ascii_letters + string.digits + "-_./: é", min_size=1, max_size=12)
_counts = st.integers(min_value=1, max_value=10_000)
_rates = st.floats(min_value=1e-9, max_value=1e3)
_recipes = st.builds(
    Recipe,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    seed=st.integers(min_value=0, max_value=2**31),
    data=st.builds(
        DataConfig,
        source=st.sampled_from(["icons", "folder", "parquet"]),
        labelled=st.lists(_words, max_size=3).map(tuple),
        image_size=_counts,
        unseen_fraction=st.floats(min_value=0, max_value=1),
        skip_bad=st.booleans(),
    ),
    teacher=st.builds(
        TeacherConfig,
        image=st.lists(_words, min_size=1, max_size=3).map(tuple),
        epochs=_counts,
        learning_rate=_rates,
    ),
    student=st.builds(StudentConfig, size=_words, text_epochs=_counts),
)


@given(_recipes)
def test_a_recipe_saved_in_a_bundle_reads_back_as_the_same_recipe(recipe: Recipe):
    text = tomli_w.dumps(toml_tree(recipe))
    # TOML has no null: a field that is None is left out, so only such fields may fall to defaults.
    again = recipe_from_toml(text, origin="saved")
    if recipe.data.target is not None:
        assert again == recipe


def test_an_empty_recipe_is_the_default():
    assert recipe_from_toml("", origin="r.toml") == Recipe()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[student]\nepoch = 3", ["r.toml", "student.epoch", "did you mean 'student.text_epochs'"]),
        ("[teachr]\n", ["r.toml", "teachr", "did you mean 'teacher'"]),
        ("[student]\ntext_epochs = 'three'", ["student.text_epochs", "Expected `int`, got `str`"]),
        ("[student]\ntext_epochs = 0", ["student.text_epochs", ">= 1"]),
        ("seed = -1", ["seed", ">= 0"]),
        ("seed = 4294967296", ["seed", "<= 4294967295"]),
        ("[teacher]\nlearning_rate = inf", ["teacher.learning_rate", "<= 1.79"]),
        ("[teacher.domain]\nmmd_weight = inf", ["teacher.domain.mmd_weight", "<= 1.79"]),
        ("[teacher]\ntemperature = nan", ["teacher.temperature", "> 0.0"]),
        ("[teacher]\nlora_dropout = 1.0", ["teacher.lora_dropout", "< 1.0"]),
        ("[teacher]\ninput_dropout = 1", ["teacher.input_dropout", "< 1.0"]),
        ("[data]\nunseen_fraction = 1.5", ["data.unseen_fraction", "<= 1.0"]),
        ("[data]\nsource = 'ftp'", ["data.source", "ftp"]),
        ("[quantize]\ncandidates = ['fp16', 'int3']", ["quantize.candidates", "int3"]),
        ("[quantize]\ncalibration_samples = 1", ["quantize.calibration_samples", ">= 2"]),
        ("seed = 1\nseed = 2\n[data]", ["r.toml is not TOML", "line 2"]),
        ("[student", ["r.toml is not TOML"]),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_its_key_and_file(text: str, words: list[str]):
    with pytest.raises(UserError) as caught:
        recipe_from_toml(text, origin="r.toml")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.text_epochs=3", 3),
        ("student.text_epochs= 3", 3),
        ("seed=7", 7),
        ("data.skip_bad=true", True),
        ("teacher.text=hf:owner/name", "hf:owner/name"),
        ('teacher.text="quoted"', "quoted"),
        ("teacher.text=a=b", "a=b"),
        ('teacher.lora_targets=["query"]', ("query",)),
    ],
)
def test_set_overrides_one_value_with_the_type_it_has_in_toml(override: str, expected: object):
    value: object = recipe_from_toml("", origin="r", overrides=[override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected


@pytest.mark.parametrize(
    "override", ["seed", "=3", "seed.deep=3", "student.epoch=3", "student.text_epochs=x", ".=1"]
)
def test_a_wrong_override_is_bad_input(override: str):
    with pytest.raises(UserError):
        recipe_from_toml("seed = 0", origin="r", overrides=[override])


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file():
    with pytest.raises(
        UserError, match=r"^--set student\.text_epochs=x: student\.text_epochs: Expected `int`"
    ):
        recipe_from_toml("seed = 1", origin="r.toml", overrides=["seed=2", "student.text_epochs=x"])
    with pytest.raises(UserError, match=r"^--set student\.epoch=3: unknown recipe key"):
        recipe_from_toml("", origin="r.toml", overrides=["student.epoch=3"])
    with pytest.raises(UserError, match=r"^r\.toml: "):
        recipe_from_toml("seed = 'x'", origin="r.toml", overrides=["student.text_epochs=x"])


def test_a_table_without_values_is_not_written():
    assert "engine" not in toml_tree(Recipe())
    asked = recipe_from_toml("[engine]\nrefit = true", origin="r.toml")
    assert toml_tree(asked)["engine"] == {"refit": True}


@given(st.text(max_size=60), st.lists(st.text(max_size=20), max_size=2))
@example("", ["data.labelled.x=1", "a.b.c=1"])
def test_no_text_makes_the_parser_fail_in_another_way(text: str, overrides: list[str]):
    with contextlib.suppress(UserError):
        assert isinstance(recipe_from_toml(text, origin="r", overrides=overrides), Recipe)


def test_plans_lie_beside_the_recipe_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[quantize]\nimage_plan = "plans/image.toml"\n')
    quantize = recipe_from_file(tmp_path / "r.toml").quantize
    assert quantize.image_plan == str(tmp_path.resolve() / "plans" / "image.toml")
    assert quantize.text_plan == ""


def test_a_missing_recipe_says_where_it_was_looked_for(tmp_path: Path):
    with pytest.raises(UserError, match=r"no recipe at .*none\.toml; give the path"):
        recipe_from_file(tmp_path / "none.toml")


def test_a_recipe_saved_with_a_byte_order_mark_is_read(tmp_path: Path):
    (tmp_path / "r.toml").write_text("seed = 3\n", "utf-8-sig")
    assert recipe_from_file(tmp_path / "r.toml").seed == 3


def test_a_recipe_that_is_not_text_is_bad_input(tmp_path: Path):
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        recipe_from_file(tmp_path / "r.toml")
    with pytest.raises(UserError, match="cannot read"):
        recipe_from_file(tmp_path)


def test_paths_in_a_recipe_start_at_the_recipe(tmp_path: Path):
    (tmp_path / "r.toml").write_text('[data]\nsource = "folder"\npath = "pictures"\n')
    assert recipe_from_file(tmp_path / "r.toml").data.path == str(tmp_path / "pictures")


def test_a_teacher_beside_the_recipe_is_found_from_any_folder(tmp_path: Path):
    file = tmp_path / "own.toml"
    names = ["./vit", "efficientnet-lite0", "hf:a/b", "~/c"]
    file.write_text(f'[teacher]\nimage = {json.dumps(names)}\ntext = "towers/bert"\n')
    teacher = recipe_from_file(file).teacher
    assert teacher.image == (str(tmp_path / "vit"), "efficientnet-lite0", "hf:a/b", "~/c")
    assert teacher.text == str(tmp_path / "towers" / "bert")
