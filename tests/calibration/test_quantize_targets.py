"""What a file is for, where its samples came from, and what it was made of."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.conversion import int8_by_plan, ranges_from_batches, whole_plan
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.outcome import Settings
from edgeglm.calibration.plan import plan_from_file
from edgeglm.calibration.precision import fp16_from_fp32
from edgeglm.calibration.preparation import prepared_model
from edgeglm.calibration.scoring import measure_against
from edgeglm.calibration.source import source_bytes, source_sha256
from edgeglm.cli.main import exit_code
from edgeglm.core.errors import UserError
from edgeglm.export.lanes import lane_problems
from edgeglm.targets.schema import load_target
from scripts.fixtures.graphs import normal
from tests.calibration.towers import batches_of, tower_tensors

CPU, T4, XAVIER = load_target("cpu"), load_target("t4"), load_target("jetson-agx-xavier")


def test_a_plan_that_is_slower_than_fp32_is_not_written_either(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeglm.calibration.any_model.speedup_over", lambda *_, **__: lambda _: 0.4)
    plan = whole_plan(prepared_model(fp32_dir / "text.onnx"), "u8s8")
    outcome = quantize_onnx(
        fp32_dir / "text.onnx", batches_of("text"), tmp_path / "out", target=CPU, plan=plan
    )
    assert not outcome.passed
    assert "0.40 x its speed" in outcome.search.reason
    assert not (tmp_path / "out").exists()


def test_a_file_that_turns_out_slower_when_timed_again_is_not_written(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(path: Path) -> float:
        return 0.9 if path.name == "model.onnx" else 1.2

    monkeypatch.setattr("edgeglm.calibration.any_model.speedup_over", lambda *_, **__: timed)
    outcome = quantize_onnx(fp32_dir / "text.onnx", batches_of("text"), tmp_path / "out", target=CPU)
    assert not outcome.passed
    assert "not faster than FP32" in outcome.search.reason


@pytest.mark.parametrize(
    ("target", "scheme", "message"),
    [
        (T4, "u8s8", "symmetric Q/DQ only; take one of fp8, tensorrt"),
        (T4, "dynamic", "symmetric Q/DQ only"),
        (CPU, "tensorrt", "runs ONNX Runtime"),
    ],
)
def test_a_scheme_that_the_target_does_not_compute_is_refused(
    fp32_dir: Path, tmp_path: Path, target: Any, scheme: str, message: str
) -> None:
    source = fp32_dir / "text.onnx"
    for chosen in (
        {"settings": Settings(scheme=scheme)},
        {"plan": whole_plan(prepared_model(source), scheme)},
    ):
        with pytest.raises(UserError, match=message):
            quantize_onnx(source, batches_of("text"), tmp_path / "out", target=target, **chosen)


def test_int4_tables_are_refused_where_tensorrt_would_have_to_read_them(
    fp32_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="take --embeddings int8"):
        quantize_onnx(
            fp32_dir / "text.onnx",
            batches_of("text"),
            tmp_path / "out",
            target=T4,
            settings=Settings(embeddings="int4"),
        )


@pytest.mark.parametrize(("target", "lane"), [(T4, "B"), (XAVIER, "A")])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_what_is_written_for_tensorrt_is_legal_on_the_targets_lane(
    fp32_dir: Path, tmp_path: Path, target: Any, lane: Any, tower: str
) -> None:
    settings = Settings(methods=("max",), evaluations=2, gate=0.9)
    outcome = quantize_onnx(
        fp32_dir / f"{tower}.onnx", batches_of(tower), tmp_path / "out", target=target, settings=settings
    )
    assert outcome.passed
    made = onnx.load(tmp_path / "out" / "model.onnx")
    assert lane_problems(made, lane, target) == ()
    assert set(outcome.fp32_nodes) <= {node.name for node in made.graph.node}
    assert bool(outcome.fp32_nodes) == (lane == "A" and tower == "text")  # its LayerNorm is written out


def test_an_int8_file_for_tensorrt_is_scored_alike_on_cpus_that_saturate(
    fp32_dir: Path, tmp_path: Path
) -> None:
    """Without VNNI an 8-bit weight overflows 16-bit sums in integer kernels; Q/DQ as written do not."""
    source, batches = fp32_dir / "text.onnx", batches_of("text")
    prepared = prepared_model(source)
    ranges = ranges_from_batches(prepared, batches[:4], ("max",))
    int8_by_plan(prepared, tmp_path / "wide.onnx", whole_plan(prepared, "s8s8"), ranges)
    measure, _ = measure_against(source, batches[4:], metric=None, threads=1, integers=False)
    assert measure(tmp_path / "wide.onnx")[0] > 0.9995  # 0.9993 where sums saturate


def test_random_calibration_stands_in_the_plan_and_the_report_and_is_warned_of(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(fp32_dir / "image.onnx")
    noise, out = tmp_path / "noise", tmp_path / "out"
    drawn = ["calibrate", "--model", model, "--output", str(noise), "--allow-random-calibration"]
    assert exit_code(drawn) == 0
    assert "what the samples" not in capsys.readouterr().out  # noise covers nothing
    made = ["quantize", model, "--data", str(noise), "--target", "t4", "--output", str(out), "--gate", "0.5"]
    assert exit_code([*made, "--method", "max", "--evaluations", "2"]) == 0
    assert "RANDOM NUMBERS" in capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"]["source"] == "random"
    assert len(report["calibration"]["set_sha256"]) == 64
    assert plan_from_file(out / "plan.toml").calibration.startswith("RANDOM NUMBERS")


def test_the_proof_against_evaluation_samples_travels_with_the_file(fp32_dir: Path, tmp_path: Path) -> None:
    model, data = str(fp32_dir / "image.onnx"), tmp_path / "data.npz"
    train: dict[str, Any] = {**tower_tensors("image", 16)}
    test: dict[str, Any] = {**tower_tensors("image", 8, seed=9)}
    np.savez(data, **train)
    np.savez(tmp_path / "test.npz", **test)
    drawn = ["calibrate", str(data), "--model", model, "--output", str(tmp_path / "set")]
    assert exit_code([*drawn, "--evaluation", str(tmp_path / "test.npz")]) == 0
    made = ["quantize", model, "--data", str(tmp_path / "set"), "--target", "t4", "--evaluations", "2"]
    assert exit_code([*made, "--output", str(tmp_path / "out"), "--method", "max", "--gate", "0.9"]) == 0
    proof = json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["disjointness"]
    assert proof["evaluation_samples"] == 8
    assert proof["overlap"] == 0
    assert "none among 8" in plan_from_file(tmp_path / "out" / "plan.toml").calibration


def _with_weights_beside(source: Path, folder: Path, *, constant: str = "") -> Path:
    """Write a model with its weights in another file; ``constant`` names one that becomes a Constant node."""
    folder.mkdir()
    model = onnx.load(source)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name == constant]:
        node = onnx.helper.make_node("Constant", [], [constant], name=constant)
        node.attribute.append(onnx.helper.make_attribute("value", tensor))
        model.graph.node.insert(0, node)
        model.graph.initializer.remove(tensor)
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=100,
    )
    return folder / "model.onnx"


def test_a_model_with_its_weights_beside_it_becomes_fp16_and_int8(fp32_dir: Path, tmp_path: Path) -> None:
    path = _with_weights_beside(fp32_dir / "image.onnx", tmp_path / "model")
    before = source_sha256(path)
    fp16_from_fp32(path, tmp_path / "half.onnx", list(batches_of("image")[:2]))
    settings = Settings(methods=("max",), evaluations=2)
    outcome = quantize_onnx(path, batches_of("image"), tmp_path / "out", target=T4, settings=settings)
    assert outcome.passed
    assert source_sha256(path) == before
    assert outcome.source_bytes == source_bytes(path) > path.stat().st_size


def test_a_model_with_constants_to_fold_finds_its_weights_beside_it(fp32_dir: Path, tmp_path: Path) -> None:
    path = _with_weights_beside(fp32_dir / "image.onnx", tmp_path / "model", constant="six")
    plain = prepared_model(fp32_dir / "image.onnx")
    assert [group.nodes for group in prepared_model(path).groups] == [group.nodes for group in plain.groups]


def test_a_plan_does_not_fit_the_same_graph_with_other_weights(fp32_dir: Path, tmp_path: Path) -> None:
    path = _with_weights_beside(fp32_dir / "text.onnx", tmp_path / "model")
    plan = whole_plan(prepared_model(path), "u8s8")
    weights = path.with_name("weights.bin")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(UserError, match="was made for the model"):
        quantize_onnx(path, batches_of("text"), tmp_path / "out", target=CPU, plan=plan)


def test_only_linear_layers_become_int8_where_that_is_asked(fp32_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Conv, Gemm or MatMul"):
        prepared_model(fp32_dir / "image.onnx", op_types=("MatMul", "Gemm"))
    assert prepared_model(fp32_dir / "text.onnx", op_types=("MatMul",)).groups


def test_a_fixed_batch_names_the_option_that_fits_it(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(fp32_dir / "image.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    images: dict[str, Any] = {**tower_tensors("image", 16)}
    np.savez(tmp_path / "data.npz", **images)
    drawn = ["calibrate", str(tmp_path / "data.npz"), "--model", str(tmp_path / "fixed.onnx")]
    assert exit_code([*drawn, "--output", str(tmp_path / "set")]) == 2
    assert "give --batch-size 1" in capsys.readouterr().err
    assert exit_code([*drawn, "--output", str(tmp_path / "set"), "--batch-size", "1"]) == 0


def _linear(path: Path, *widths: int) -> Batches:
    """Write a chain of linear layers and return samples for it."""
    names, float32 = ["x", *(f"y{i}" for i in range(1, len(widths)))], onnx.TensorProto.FLOAT
    weights = [normal(a, b, seed=a, scale=0.3) for a, b in pairwise(widths)]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"linear{i}")
            for i in range(len(weights))
        ],
        "main",
        [onnx.helper.make_tensor_value_info("x", float32, ["batch", widths[0]])],
        [onnx.helper.make_tensor_value_info(names[-1], float32, ["batch", widths[-1]])],
        [onnx.numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return Batches({"x": normal(32, widths[0])}, 8)


def test_products_that_modelopt_leaves_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = _linear(tmp_path / "model.onnx", 32, 32, 8)
    np.savez(tmp_path / "data.npz", x=batches.arrays["x"])
    made = ["quantize", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz"), "--target", "t4"]
    assert exit_code([*made, "--method", "max", "--output", str(tmp_path / "out")]) == 0
    assert "ModelOpt leaves linear1 in high precision" in capsys.readouterr().err.replace("\n", " ")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["left_high"] == ["linear1"]


@pytest.mark.parametrize("scheme", ["tensorrt", "fp8"])
def test_a_file_with_nothing_quantized_is_not_written(tmp_path: Path, scheme: str) -> None:
    batches = _linear(tmp_path / "model.onnx", 32, 8)
    settings = Settings(scheme=scheme, methods=("max",), evaluations=2)
    with pytest.raises(UserError, match=r"every product of model\.onnx in high precision"):
        quantize_onnx(
            tmp_path / "model.onnx", batches, tmp_path / "out", target=load_target("l4"), settings=settings
        )
    assert not (tmp_path / "out").exists()


def test_free_dimensions_need_no_name(fp32_dir: Path, tmp_path: Path) -> None:
    model = onnx.load(fp32_dir / "text.onnx")
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    onnx.save(model, tmp_path / "model.onnx")
    settings = Settings(methods=("max",), evaluations=2, gate=0.9)
    outcome = quantize_onnx(
        tmp_path / "model.onnx", batches_of("text"), tmp_path / "out", target=T4, settings=settings
    )
    assert outcome.passed
    assert outcome.fp16 is not None
