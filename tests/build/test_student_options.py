"""If these fail, a line of the recipe that changes the student breaks the build, or changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeglm.adapt.teacher_stage import TeacherStage
from edgeglm.bundle.verify import open_bundle
from edgeglm.data.tokenization import Tokenizer
from tests.build.conftest import Project, Said


def built(project: Project, name: str, *overrides: str) -> tuple[Said, Path]:
    bundle = project.root / "bundles" / name
    settings = [part for override in overrides for part in ("--set", override)]
    said = project.build("cpu", *settings, output=bundle)
    assert said.code == 0, said.err
    return said, bundle


def towers(bundle: Path) -> dict[str, int]:
    manifest = json.loads((bundle / "manifest.json").read_text())
    measured = next(stage["metrics"] for stage in manifest["stages"] if stage["name"] == "export")
    return {tower: found["parameters"] for tower, found in measured["towers"].items()}


def test_towers_may_be_trained_together_by_any_terms(project: Project, cold: Said) -> None:
    said, bundle = built(
        project,
        "together",
        "student.losses.labels=1",
        "student.losses.feature=3",
        "student.losses.relational=1",
        "student.losses.steps=8",
    )
    assert {"distil-text", "distil-image"} <= set(said.ran)
    assert "teacher" not in said.ran, "the teacher is reused"
    with open_bundle(bundle) as opened:
        text = next(stage for stage in opened.manifest.stages if stage.name == "distil-text")
    assert len(text.metrics["loss"]) == 4, "both towers share the stretches of one training"


def test_a_trimmed_vocabulary_travels_with_the_tower_that_was_trained_on_it(
    project: Project, cold: Said, bundle: Path
) -> None:
    said, trimmed = built(project, "trimmed", "student.vocabulary=22", 'student.size="edge-vit"')
    assert {"distil-text", "distil-image"} <= set(said.ran)
    with open_bundle(bundle) as opened:
        whole = Tokenizer(opened.tokenizer_path).vocabulary_size
    with open_bundle(trimmed) as opened:
        assert Tokenizer(opened.tokenizer_path).vocabulary_size == 22 < whole
    said = project.edgeglm("run", trimmed, "--query", "a red circle", "-k", "3", "--json")
    assert said.code == 0, said.err
    assert len(said.json["hits"]) == 3
    assert project.edgeglm("verify", trimmed).code == 0
    assert "vocabulary-fit" in project.stored(), "a rebuild would load the whole text teacher to ask again"


def test_fewer_words_than_the_captions_have_are_refused_before_a_teacher_is_trained(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TeacherStage, "run", lambda *_: pytest.fail("a teacher comes after this"))
    other = ["--set", "teacher.epochs=9"]  # a teacher that the store does not have
    said = project.build("cpu", *other, "--set", "student.vocabulary=9", output=project.root / "few")
    assert said.code == 2
    assert "student.vocabulary is 9, but single characters" in said.err
    assert not (project.root / "few").exists()


def test_branches_leave_no_trace_in_the_file_but_another_student(
    project: Project, cold: Said, bundle: Path
) -> None:
    said, branched = built(project, "branched", "student.branches=true")
    assert "distil-image" in said.ran
    assert "distil-text" not in said.ran, "the other tower is reused"
    assert towers(branched) == towers(bundle)
    assert (branched / "models/fp32/image.onnx").read_bytes() != (
        bundle / "models/fp32/image.onnx"
    ).read_bytes()


def test_an_heir_of_a_teacher_that_is_too_narrow_is_refused_with_a_size_that_works(project: Project) -> None:
    before = sorted((project.store / "entries").iterdir())
    other = ["--set", "teacher.epochs=7"]  # a teacher that the store does not have
    said = project.build("cpu", *other, "--set", 'student.size="edge-heir"', output=project.root / "heir")
    assert said.code == 2
    assert "32 wide" in said.err
    assert "edge-s" in said.err
    assert not (project.root / "heir").exists()
    assert sorted((project.store / "entries").iterdir()) == before, "something was made for it"


def test_a_teachers_smaller_vocabulary_is_the_students_and_no_heirs(
    project: Project, cold: Said, bundle: Path
) -> None:
    said, kept = built(project, "kept", "teacher.vocabulary=22")
    assert "teacher" in said.ran
    assert "features" not in said.ran
    with open_bundle(bundle) as opened:
        whole = Tokenizer(opened.tokenizer_path).vocabulary_size
    with open_bundle(kept) as opened:
        assert Tokenizer(opened.tokenizer_path).vocabulary_size == 22 < whole
    heir = ["--set", "teacher.vocabulary=22", "--set", 'student.size="edge-heir"']
    said = project.build("cpu", *heir, output=project.root / "bundles" / "heir")
    assert said.code == 2
    assert "set teacher.vocabulary to 0" in said.err
