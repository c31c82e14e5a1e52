"""If these fail, INT8 that misses its gate is given up although training could save it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

from edgeglm.calibration.quantize import QuantizeConfig, make_candidates
from edgeglm.calibration.sets import CalibrationSet
from tests.calibration.test_quantize import Measured, _judge, calibration, every_scheme_pays

__all__ = ["calibration", "every_scheme_pays"]
INT8 = QuantizeConfig(candidates=("int8",))


class Saved(Measured):
    """FP32 and the files of tuned towers score well, what came before them does not."""

    def __init__(self, then: float) -> None:
        super().__init__({})
        self.then, self.tuned = then, 0

    def __call__(self, variant: str, files):
        whole = super().__call__(variant, files)
        score = 1.0 if variant == "fp32" else self.then if self.tuned else 0.5
        return whole | {"map10": score}


def tune_of(fp32_dir: Path, measured: Saved):
    def tune(folder: Path) -> None:
        measured.tuned += 1
        for tower in ("image", "text"):
            shutil.copyfile(fp32_dir / f"{tower}.onnx", folder / f"{tower}.onnx")

    return tune


def test_int8_that_misses_is_tuned_and_travels_when_it_then_passes(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    measured = Saved(1.0)
    report = make_candidates(
        fp32_dir,
        tmp_path,
        calibration,
        evaluate=measured,
        judge=_judge,
        config=INT8,
        tune=tune_of(fp32_dir, measured),
    )
    assert measured.tuned == 1
    assert report.variants["int8"].tuned
    assert report.variants["int8"].precisions == {"image": "int8", "text": "int8"}
    assert not report.variants["fp32"].tuned
    assert [trial.tuned for trial in report.trials["int8"]] == [False, True]


def test_int8_that_passes_costs_no_training(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    measured = Saved(1.0)
    measured.tuned = 1  # as if it were good from the start
    report = make_candidates(
        fp32_dir,
        tmp_path,
        calibration,
        evaluate=measured,
        judge=_judge,
        config=INT8,
        tune=tune_of(fp32_dir, measured),
    )
    assert measured.tuned == 1
    assert not report.variants["int8"].tuned


def test_tuned_towers_that_miss_the_gate_too_are_left_out_and_named(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    measured = Saved(0.8)
    report = make_candidates(
        fp32_dir,
        tmp_path,
        calibration,
        evaluate=measured,
        judge=_judge,
        config=INT8,
        tune=tune_of(fp32_dir, measured),
    )
    assert "int8" not in report.variants
    assert "tuned: kept 0.80" in report.left_out["int8"]
