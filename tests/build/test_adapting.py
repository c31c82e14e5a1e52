"""If these fail, `edgeglm adapt` gives another teacher than a build does, or starts over after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

from edgeglm.adapt import alignment as room
from edgeglm.build.adapting import adapt_teacher
from edgeglm.cli.main import exit_code
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import Recipe, recipe_from_file
from edgeglm.core.stage import Context
from edgeglm.core.store import Store
from edgeglm.train import checkpoint
from tests.tiny_towers import write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    write_project(root)
    return root


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MIN_STEPS", 12)
    monkeypatch.setattr(room, "MIN_LORA_STEPS", 4)


def recipe(project: Path, *overrides: str) -> Recipe:
    return recipe_from_file(project / "recipe.toml", overrides=overrides)


def context(store: Path) -> Context:
    return Context(store=Store(store), progress=QuietProgress(), threads=1)


def test_the_command_writes_a_whole_teacher_and_reuses_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEGLM_STORE", str(tmp_path / "store"))
    out = tmp_path / "teacher"
    arguments = ["adapt", "--recipe", str(project / "recipe.toml"), "--threads", "1", "--json", "--output"]
    assert exit_code([*arguments, str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    written = {path.name for path in out.iterdir()}
    assert {"text.onnx", "image-head.onnx", "image-0.onnx", "tokenizer.json", "metrics.json"} <= written
    assert json.loads((out / "metrics.json").read_text()) == said["metrics"]
    assert exit_code([*arguments, str(out)]) == 2
    assert "is there already; choose another --output or move it away" in capsys.readouterr().err
    assert exit_code([*arguments, str(tmp_path / "again")]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == said["digest"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("writings", [2, 5])
def test_a_teacher_goes_on_from_its_checkpoints_and_ends_the_same(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writings: int
) -> None:
    wanted = recipe(project, "teacher.optimisation.checkpoint_epochs=1", "teacher.epochs=3")
    whole = adapt_teacher(wanted, tmp_path / "whole", context(tmp_path / "one"))
    count = 0
    write = checkpoint.Checkpoint.write

    def killing(self: Any, **state: Any) -> bool:
        nonlocal count
        count += 1
        if count > writings:
            raise Killed
        return write(self, **state)

    monkeypatch.setattr(checkpoint.Checkpoint, "write", killing)
    with pytest.raises(Killed):
        adapt_teacher(wanted, tmp_path / "resumed", context(tmp_path / "two"))
    monkeypatch.setattr(checkpoint.Checkpoint, "write", write)
    assert list((tmp_path / "two" / "checkpoints").glob("*/*.pt"))
    resumed = adapt_teacher(wanted, tmp_path / "resumed", context(tmp_path / "two"))
    assert resumed.teacher.digest == whole.teacher.digest
    assert not list((tmp_path / "two" / "checkpoints").glob("*/*")), "nothing is left of them"


def test_options_that_keep_state_change_nothing_else(project: Path, tmp_path: Path) -> None:
    plain = adapt_teacher(recipe(project), tmp_path / "a", context(tmp_path / "store"))
    kept = adapt_teacher(
        recipe(project, "teacher.optimisation.checkpoint_epochs=2"),
        tmp_path / "b",
        context(tmp_path / "store"),
    )
    assert plain.teacher.files == kept.teacher.files


def test_a_domain_without_unlabelled_images_is_refused_and_nothing_is_written(
    project: Path, tmp_path: Path
) -> None:
    wanted = recipe(project, "teacher.domain.mmd_weight=1.0")
    with pytest.raises(UserError, match=r"hold 0; give at least 8"):
        adapt_teacher(wanted, tmp_path / "out", context(tmp_path / "store"))
    assert not (tmp_path / "out").exists()
