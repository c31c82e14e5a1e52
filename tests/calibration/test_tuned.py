"""If these fail, INT8 that misses its gate is given up although training could save it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("modelopt")

from edgeglm.calibration.quantize import make_candidates  # noqa: E402
from edgeglm.calibration.sets import CalibrationSet  # noqa: E402
from edgeglm.calibration.variants import QuantizeConfig, QuantizeReport  # noqa: E402
from tests.calibration.candidates import Measured, judge  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_scheme_pays")
INT8 = QuantizeConfig(candidates=("int8",))


class Towers(Measured):
    """A task that INT8 costs half of each tower it meets, but for a tower that was tuned for it."""

    def __init__(self, fp32_dir: Path, *, costs: dict[str, float], saved: dict[str, float]) -> None:
        super().__init__({})
        self.fp32_dir, self.costs, self.saved = fp32_dir, costs, saved
        self.tuned: list[str] = []

    def __call__(self, variant: str, files):
        score = 1.0
        for tower, path in files.items():
            tuned = "tuned-" in str(path)
            whole = variant == "int8" and _is_int8(path)
            score -= (self.saved if tuned and tower in self.tuned else self.costs)[tower] if whole else 0.0
        return super().__call__(variant, files) | {"map10": score}

    def tune(self, folder: Path, tower: str) -> None:
        assert sorted(path.name for path in folder.iterdir()) == ["image.onnx", "text.onnx"]
        self.tuned.append(tower)
        shutil.copyfile(self.fp32_dir / f"{tower}.onnx", folder / f"{tower}.onnx")

    def candidates(self, out: Path, calibration: CalibrationSet) -> QuantizeReport:
        return make_candidates(
            self.fp32_dir,
            out,
            calibration,
            evaluate=self,
            judge=judge,
            config=INT8,
            tune=self.tune,
        )


def _is_int8(path: Path) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)


COSTLY = {"image": 0.1, "text": 0.3}
FREE = {"image": 0.0, "text": 0.0}


def test_the_tower_that_costs_more_is_tuned_and_the_other_left_as_it_is(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    task = Towers(fp32_dir, costs={"image": 0.005, "text": 0.3}, saved=FREE)
    report = task.candidates(tmp_path, calibration)
    assert task.tuned == ["text"]
    assert report.variants["int8"].tuned
    assert report.variants["int8"].precisions == {"image": "int8", "text": "int8"}
    assert not report.variants["fp32"].tuned
    assert [trial.tuned for trial in report.trials["int8"]] == [False] * 4 + [True]


def test_both_are_tuned_where_one_does_not_suffice(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    task = Towers(fp32_dir, costs=COSTLY, saved=FREE)
    report = task.candidates(tmp_path, calibration)
    assert task.tuned == ["text", "image"]
    assert report.variants["int8"].tuned


def test_int8_that_passes_costs_no_training(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    task = Towers(fp32_dir, costs=FREE, saved=FREE)
    report = task.candidates(tmp_path, calibration)
    assert task.tuned == []
    assert not report.variants["int8"].tuned


def test_tuned_towers_that_miss_the_gate_too_are_left_out_and_named(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    task = Towers(fp32_dir, costs=COSTLY, saved={"image": 0.1, "text": 0.1})
    report = task.candidates(tmp_path, calibration)
    assert "int8" not in report.variants
    assert "tuned: kept 0.80" in report.left_out["int8"]
