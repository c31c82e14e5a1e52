"""If these fail, an adaptation that cannot work ends in a traceback, wrong figures, or without a remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

from edgeglm.adapt import alignment
from edgeglm.adapt.features_stage import BackbonesStage, FeaturesStage
from edgeglm.adapt.teacher_stage import TeacherStage
from edgeglm.build.evaluations import TeacherEvaluation
from edgeglm.data.folder import OwnPairsStage
from edgeglm.distill.stages import TargetsStage
from edgeglm.train.checkpoint import Checkpoint
from tests.build.conftest import Project, Said
from tests.tiny_towers import write_project

Adapting = Callable[..., Said]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of its own: what is refused here is kept from the builds of the others."""
    return Project(
        write_project(tmp_path_factory.mktemp("project")), tmp_path_factory.mktemp("project-store")
    )


@pytest.fixture
def adapting(small: Project, tmp_path: Path) -> Adapting:
    """`edgeglm adapt` with changes to the recipe; nothing may be written where it fails."""

    def run(*overrides: str, data: Path | None = None) -> Said:
        more = [part for one in overrides for part in ("--set", one)]
        own = [] if data is None else ["--data", data]
        recipe, out = small.root / "recipe.toml", tmp_path / "teacher"
        said = small.edgeglm("adapt", "--recipe", recipe, "--threads", "1", "--output", out, *more, *own)
        assert "Traceback" not in said.err
        assert out.exists() == (said.code == 0)
        return said

    return run


def remedy(said: Said) -> str:
    (error,) = (line for line in said.err.splitlines() if line.startswith("error: "))
    return error.rpartition(";")[2].strip()


def rewritten(small: Project, folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> Path:
    """Return a copy of the project's data with every line changed."""
    shutil.copytree(small.root / "data", folder)
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(change(json.loads(line))) for line in lines))
    return folder


def test_pairs_of_one_caption_are_refused(small: Project, adapting: Adapting, tmp_path: Path) -> None:
    said = adapting(data=rewritten(small, tmp_path / "data", lambda line: {**line, "text": "a thing"}))
    assert said.code == 2
    assert remedy(said) == "add pairs that differ"


def test_one_caption_left_to_train_on_is_refused(small: Project, adapting: Adapting, tmp_path: Path) -> None:
    def two(line: dict[str, str]) -> dict[str, str]:
        return {**line, "text": "red" if "red" in line["text"] else "other"}

    said = adapting("data.unseen_fraction=0.5", data=rewritten(small, tmp_path / "data", two))
    assert said.code == 2
    assert remedy(said) == "give at least two different captions"


def test_pictures_of_one_category_are_refused_where_categories_are_to_be_told(
    small: Project, adapting: Adapting, tmp_path: Path
) -> None:
    data = rewritten(small, tmp_path / "data", lambda line: {**line, "category": "thing"})
    said = adapting("teacher.multitask.category_weight=1.0", data=data)
    assert said.code == 2
    assert "the labelled images are of 1 category" in said.err
    assert remedy(said).endswith("give lines of your own two values of category at least")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teacher.domain.mmd_weight=1.0", "asks for unlabelled images, and the pairs hold 0"),
        ("teacher.multitask.category_weight=1.0", "the labelled images are of 0 category"),
        ("teacher.multitask.reptile_rounds=2", "reptile_over = 'styles' finds 1"),
        ("teacher.vocabulary=9", "teacher.vocabulary is 9, but single characters"),
    ],
)
def test_pairs_that_lack_what_the_teacher_is_to_learn_are_refused_before_features_are_made(
    small: Project, adapting: Adapting, monkeypatch: pytest.MonkeyPatch, override: str, words: str
) -> None:
    monkeypatch.setattr(BackbonesStage, "run", lambda *_: pytest.fail("features come after this"))
    said = adapting(override, "teacher.resolution=64")
    assert said.code == 2
    assert words in said.err


def test_a_folder_without_a_picture_is_refused(adapting: Adapting, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text("\n")
    said = adapting(data=tmp_path / "data")
    assert said.code == 2
    assert "gives 0 usable pairs" in said.err


def test_copies_of_pictures_that_evaluate_are_refused_in_training(
    small: Project, adapting: Adapting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One's own copies are kept on one side of the split; a split that missed them must not train either.
    data = rewritten(small, tmp_path / "data", lambda line: line)
    lines = (data / "pairs.jsonl").read_text().splitlines()
    for line in map(json.loads, list(lines)):
        pixels = np.array(Image.open(data / line["image"]).convert("RGB"))
        pixels[0, 0] ^= 1
        name = line["image"].replace(".png", "-again.png")
        Image.fromarray(pixels).save(data / name)
        lines.append(json.dumps({"image": name, "text": f"{line['text']} again"}))
    (data / "pairs.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("edgeglm.data.folder._alike", lambda *_: [])
    said = adapting("data.unseen_fraction=0.4", data=data)
    assert said.code == 2
    assert "are copies of images held out for evaluation" in said.err
    assert remedy(said) == "take the copies out of the data"


def test_targets_that_match_nothing_list_the_layers_that_there_are(adapting: Adapting) -> None:
    said = adapting('teacher.lora_targets=["q_proj"]')
    assert said.code == 2
    assert remedy(said) == "choose from dense, key, query, value"


@pytest.mark.parametrize(
    ("changed", "last"),
    [
        (["teacher.learning_rate=1e30"], "lower teacher.learning_rate"),
        (["teacher.lora_learning_rate=1e30"], "lower teacher.lora_learning_rate"),
    ],
)
def test_a_loss_that_is_no_number_names_its_place_and_the_rate(
    adapting: Adapting, changed: list[str], last: str
) -> None:
    said = adapting(*changed)
    assert said.code == 2
    assert "the loss of batch" in said.err
    assert "at step" in said.err
    assert remedy(said) == last


def exhausted(*_: Any, **__: Any) -> Any:
    raise MemoryError


@pytest.mark.parametrize(
    ("place", "name", "fresh", "last"),
    [
        (OwnPairsStage, "run", "data.image_size=33", "lower data.image_size or data.concepts"),
        (
            BackbonesStage,
            "run",
            "teacher.resolution=64",
            "lower teacher.resolution, or take a smaller teacher.image",
        ),
        (FeaturesStage, "run", "teacher.views=2", "lower teacher.views, or take a smaller teacher.image"),
        (alignment, "concept_contrastive", "teacher.hidden=40", "lower teacher.batch_size"),
        (TeacherStage, "run", "teacher.hidden=40", "lower teacher.views or data.concepts"),
        (TeacherEvaluation, "run", "teacher.hidden=41", "lower data.concepts"),
    ],
)
def test_memory_that_does_not_suffice_names_what_to_lower_at_every_stage(
    adapting: Adapting, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, fresh: str, last: str
) -> None:
    monkeypatch.setattr(place, name, exhausted)
    said = adapting(fresh)
    assert said.code == 2, said.err
    assert "memory does not suffice" in said.err
    assert remedy(said) == last


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_student_whose_loss_is_no_number_names_its_own_rate(
    project: Project, cold: Said, tmp_path: Path, tower: str
) -> None:
    rate = f"student.{tower}_learning_rate"
    said = project.build("cpu", "--set", f"{rate}=1e30", output=tmp_path / "bundle")
    assert said.code == 2
    assert "the loss of batch" in said.err
    assert remedy(said) == f"lower {rate}"


def test_a_build_without_memory_for_the_teachers_words_names_the_corpus(
    project: Project, cold: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TargetsStage, "run", exhausted)
    said = project.build("cpu", "--set", "student.corpus=39", output=tmp_path / "bundle")
    assert said.code == 2
    assert remedy(said) == "lower student.corpus or data.concepts"


def test_a_checkpoint_of_another_recipe_is_refused_and_stays(
    small: Project, adapting: Adapting, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Checkpoint.write

    def killing(self: Any, state: Any) -> bool:
        write(self, state)
        raise KeyboardInterrupt

    kept = []
    monkeypatch.setattr(Checkpoint, "write", killing)
    for hidden in (48, 96):
        before = set(small.store.glob("checkpoints/*/warm-up.pt"))
        assert adapting(f"teacher.hidden={hidden}").code == 130
        (made,) = set(small.store.glob("checkpoints/*/warm-up.pt")) - before
        kept.append(made)
    monkeypatch.setattr(Checkpoint, "write", write)
    shutil.copyfile(kept[0], kept[1])
    said = adapting("teacher.hidden=96")
    assert said.code == 2
    assert "is of another model or recipe" in said.err
    assert remedy(said) == "delete it or choose another"
    kept[1].unlink()
    assert adapting("teacher.hidden=96").code == 0
