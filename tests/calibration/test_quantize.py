from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx

from edgeglm.calibration.conversion import whole_plan
from edgeglm.calibration.preparation import prepared_model
from edgeglm.calibration.quantize import make_candidates
from edgeglm.calibration.sets import CalibrationSet
from edgeglm.calibration.towers import TowerFiles
from edgeglm.calibration.variants import QuantizeConfig
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from tests.calibration.candidates import Measured, judge

pytestmark = pytest.mark.usefixtures("every_scheme_pays")


def test_what_travels_is_the_very_file_that_was_measured(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    measured = Measured({})
    report = make_candidates(fp32_dir, tmp_path, calibration, evaluate=measured, judge=judge)
    assert sorted(report.variants) == ["fp16", "fp32", "int8"]
    for name, variant in report.variants.items():
        on_disk = {tower: sha256_file(tmp_path / name / f"{tower}.onnx") for tower in ("image", "text")}
        assert variant.sha256 == on_disk
        assert (name, on_disk) in measured.files
    assert report.variants["int8"].precisions == {"image": "int8", "text": "int8"}
    assert not (tmp_path / ".scratch").exists()
    assert json.loads((tmp_path / "variants.json").read_text())["left_out"] == {}


def test_a_tower_that_int8_breaks_stays_in_fp16_and_the_report_says_so(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    measured = Measured({"int8,int8": 0.5, "-,int8": 0.6, "int8,-": 0.995})
    report = make_candidates(fp32_dir, tmp_path, calibration, evaluate=measured, judge=judge)
    assert report.variants["int8"].precisions == {"image": "int8", "text": "fp16"}
    assert report.variants["int8"].metrics == {"map10": 0.995}
    # Both whole, with residual sums in INT8 and without; then each beside the other in FP16.
    assert [trial.verdict.passed for trial in report.trials["int8"]] == [False, False, True, False]


def test_an_int8_that_fails_in_every_form_is_left_out_with_the_reasons(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    measured = Measured({"int8,int8": 0.5, "-,int8": 0.6, "int8,-": 0.7})
    report = make_candidates(fp32_dir, tmp_path, calibration, evaluate=measured, judge=judge)
    assert sorted(report.variants) == ["fp16", "fp32"]
    assert "image int8 with residuals + text fp16: kept 0.70" in report.left_out["int8"]
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize("harmful", ["", "text", "image"])
def test_residual_sums_are_int8_for_tensorrt_where_the_gate_allows(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet, harmful: str
) -> None:
    def evaluate(variant: str, files: Mapping[str, Path]) -> dict[str, Any]:
        costs = variant == "int8" and harmful and _sums_int8(files[harmful])
        return {"map10": 0.9 if costs else 1.0}

    policies = {"image": "linear-and-conv", "text": "linear-only"}
    config = QuantizeConfig(candidates=("int8",), policies=policies)
    report = make_candidates(fp32_dir, tmp_path, calibration, evaluate=evaluate, judge=judge, config=config)
    kept = {"": ("image", "text"), "text": ("image",), "image": ()}
    trials = report.trials["int8"]
    assert [trial.residuals for trial in trials][-1] == kept[harmful]
    assert [trial.verdict.passed for trial in trials] == [False] * (len(trials) - 1) + [True]
    assert report.variants["int8"].precisions == {"image": "int8", "text": "int8"}
    conversions = report.variants["int8"].conversions
    assert {tower for tower, made in conversions.items() if made.residuals} == set(kept[harmful])


@pytest.mark.parametrize("scheme", ["u8s8", ""])  # on a CPU, and by ModelOpt
def test_a_searched_plan_returns_the_harmful_group_within_the_budget(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet, scheme: str
) -> None:
    measured: list[Path] = []

    def evaluate(_: str, files: Mapping[str, Path]) -> dict[str, Any]:
        measured.append(files["text"])
        harmful = not _reads_float(files["text"], "down")
        return {"map10": 0.5 if harmful else 1.0}

    report = make_candidates(
        fp32_dir,
        tmp_path,
        calibration,
        evaluate=evaluate,
        judge=judge,
        config=QuantizeConfig(
            candidates=("int8",),
            schemes={"image": ("u8s8-chains",), "text": (scheme,)} if scheme else {},
            policies={"image": "linear-and-conv", "text": "linear-only"},
            search_evaluations=6,
            high_precision="fp32" if scheme else "fp16",
        ),
    )
    conversion = report.variants["int8"].conversions["text"]
    assert conversion.plan is not None
    assert conversion.quantized_nodes == ("up/MatMul",)
    assert report.searches["text"].ranking[0].group == "down/MatMul"
    assert 0 < len(report.searches["text"].evaluations) <= 6
    assert report.variants["int8"].precisions == {"image": "int8", "text": "int8"}
    assert len(measured) <= 2 * 6 + 3  # FP32, both whole, both searched


def test_on_a_cpu_the_fastest_scheme_makes_the_tower_and_one_that_never_pays_stays_in_fp32(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(path: Path) -> float:
        if path.name.startswith("image"):
            return 0.7
        return 1.9 if "-dynamic-" in path.name else 1.4

    monkeypatch.setattr("edgeglm.calibration.towers.speedup_over", lambda *_, **__: timed)
    config = QuantizeConfig(
        candidates=("int8",),
        schemes={"image": ("u8s8-chains",), "text": ("u8s8", "dynamic")},
        high_precision="fp32",
    )
    report = make_candidates(
        fp32_dir, tmp_path, calibration, evaluate=Measured({}), judge=judge, config=config
    )
    made = report.variants["int8"]
    assert made.precisions == {"image": "fp32", "text": "int8"}
    assert made.conversions["text"].plan is not None
    assert made.conversions["text"].plan.scheme == "dynamic"
    assert report.speedups == {"image": {"u8s8-chains": 0.7}, "text": {"u8s8": 1.4, "dynamic": 1.9}}


def test_no_int8_travels_where_nothing_is_faster_and_the_times_say_so(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeglm.calibration.towers.speedup_over", lambda *_, **__: lambda _: 0.5)
    config = QuantizeConfig(
        candidates=("int8",),
        schemes={"image": ("u8s8-chains",), "text": ("u8s8",)},
        high_precision="fp32",
    )
    report = make_candidates(
        fp32_dir, tmp_path, calibration, evaluate=Measured({}), judge=judge, config=config
    )
    assert sorted(report.variants) == ["fp32"]
    assert "image u8s8-chains 0.50 x" in report.left_out["int8"]
    (trial,) = report.trials["int8"]
    assert not trial.verdict.passed
    assert trial.verdict.score == 1.0, "what it would have kept is told all the same"


def _reads_float(path: Path, layer: str) -> bool:
    graph = onnx.load(path).graph
    return any(t.name == f"{layer}.w" and t.data_type != onnx.TensorProto.INT8 for t in graph.initializer)


def _sums_int8(path: Path) -> bool:
    graph = onnx.load(path).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return any(node.op_type == "Add" and dequantized & set(node.input) for node in graph.node)


def test_a_plan_that_somebody_wrote_is_applied_as_it_is(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    prepared = prepared_model(fp32_dir / "text.onnx")
    plan = whole_plan(prepared, "u8s8", "mse").with_precisions({"down/MatMul"})
    report = make_candidates(
        fp32_dir,
        tmp_path,
        calibration,
        evaluate=Measured({}),
        judge=judge,
        config=QuantizeConfig(
            candidates=("int8",), plans={"text": plan}, schemes={"image": ("u8s8-chains",)}
        ),
    )
    assert report.variants["int8"].conversions["text"].plan == plan
    assert report.variants["int8"].conversions["text"].quantized_nodes == ("up/MatMul",)


def test_a_plan_that_is_not_faster_on_this_cpu_stays_in_fp32(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speedup(path: Path) -> float:
        return 0.8 if "plan" in path.name else 1.5

    monkeypatch.setattr("edgeglm.calibration.towers.speedup_over", lambda *_, **__: speedup)
    plan = whole_plan(prepared_model(fp32_dir / "text.onnx"), "u8s8")
    report = make_candidates(
        fp32_dir,
        tmp_path,
        calibration,
        evaluate=Measured({}),
        judge=judge,
        config=QuantizeConfig(
            candidates=("int8",),
            plans={"text": plan},
            schemes={"image": ("u8s8-chains",), "text": ("u8s8",)},
            high_precision="fp32",
        ),
    )
    assert report.variants["int8"].precisions == {"image": "int8", "text": "fp32"}
    assert report.speedups["text"] == {"plan": 0.8}


def test_absent_towers_and_policies_are_named(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet
) -> None:
    with pytest.raises(UserError, match=r"no image\.onnx"):
        make_candidates(tmp_path, tmp_path / "out", calibration, evaluate=Measured({}), judge=judge)
    with pytest.raises(UserError, match="did you mean 'linear-only'"):
        make_candidates(
            fp32_dir,
            tmp_path / "out",
            calibration,
            evaluate=Measured({}),
            judge=judge,
            config=QuantizeConfig(policies={"image": "linear-onli", "text": "linear-only"}),
        )


@pytest.mark.parametrize(("batch_size", "shared"), [(4, (8, 8)), (16, (8, 8)), (6, (12, 4))])
def test_ranges_are_not_found_on_what_the_cosine_is_measured_on(
    fp32_dir: Path, tmp_path: Path, calibration: CalibrationSet, batch_size: int, shared: tuple[int, int]
) -> None:
    record = msgspec.structs.replace(calibration.record, batch_size=batch_size)
    files = TowerFiles(
        fp32_dir=fp32_dir,
        scratch=tmp_path,
        calibration=CalibrationSet(folder=calibration.folder, record=record),
        config=QuantizeConfig(),
        progress=QuietProgress(),
    )
    seen, held_out = files._split("image")
    assert (seen.samples, held_out.samples) == shared
    assert seen.stop == held_out.start
    assert files.int8("image", "max").fidelity.mean_cosine < 1.0
