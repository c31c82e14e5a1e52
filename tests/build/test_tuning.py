"""If this fails, an INT8 that misses its gate is not trained for, or its towers do not reach the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeglm.build import tower_scores
from edgeglm.build.quantize_stage import quantize_config
from edgeglm.calibration.variants import Verdict
from edgeglm.core.recipe import Recipe, StudentConfig
from edgeglm.targets.schema import load_target
from tests.build.conftest import Project, Said


def test_a_build_tunes_the_students_once_int8_misses_and_packs_what_then_passes(
    project: Project, cold: Said, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = tower_scores.TowerScores.judged
    asked: list[float] = []

    def strict(self, metrics, baseline):
        """The real verdict, but the first INT8 pair is said to miss: towers this small never do."""
        verdict = judged(self, metrics, baseline)
        asked.append(verdict.score)
        if len(asked) <= 2:  # one for each way of finding ranges
            return Verdict(passed=False, score=0.0, reason="said to miss")
        return verdict

    monkeypatch.setattr(tower_scores.TowerScores, "judged", strict)
    place = project.root / "bundles" / "tuned"
    lines = ('quantize.candidates=["int8"]', "quantize.qat_steps=3")
    said = project.build("cpu", *(part for line in lines for part in ("--set", line)), output=place)
    assert said.code == 0, said.err
    assert said.ran[0] == "quantize", "nothing before it is made again"
    assert "tuned while rounded" in (place / "report.html").read_text("utf-8"), (
        "its figures are of other weights"
    )
    manifest = json.loads((place / "manifest.json").read_text())
    measured = next(stage["metrics"] for stage in manifest["stages"] if stage["name"] == "quantize")
    assert measured["tuned"] == ["int8"], measured
    int8 = next(variant for variant in manifest["variants"] if variant["name"] == "int8")
    assert int8["gate"] == "passed"
    assert project.edgeglm("run", place, "--query", "a red circle", "--variant", "int8").code == 0
    assert (place / "models/fp32/image.onnx").read_bytes() == (
        bundle / "models/fp32/image.onnx"
    ).read_bytes(), "the reference stays what it was"


def test_how_often_a_training_was_kept_makes_no_int8_anew() -> None:
    rare, often = (
        quantize_config(Recipe(student=StudentConfig(checkpoint_epochs=every)), load_target("cpu"), ("int8",))
        for every in (0, 1)
    )
    assert rare.tuning is not None
    assert rare == often
