"""If these fail, an FP16 model answers with NaN or noise on a device, and nobody was told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeglm.core.errors import UserError
from edgeglm.evaluate.parity import cosine_rows
from edgeglm.export.fp16_lint import fp16_ready, lint_file, lint_fp16
from edgeglm.export.ranges import measured_ranges
from scripts.fixtures.graphs import answers, graph_model, normal
from scripts.fixtures.planted import WIDTH, cast_to_fp16, fp16_answers, planted
from tests.calibration.towers import image_tower, text_tower, tower_tensors

PLANTED = planted()
X = normal(3, 4, WIDTH, seed=7)


def apart(actual: np.ndarray, expected: np.ndarray) -> float:
    if not np.isfinite(actual).all():
        return 2.0
    cosine = float(cosine_rows(actual.reshape(3, -1), expected.reshape(3, -1)).min())
    return 2.0 if np.isnan(cosine) else 1.0 - cosine  # all zeros: everything was divided by infinity


@pytest.mark.parametrize("name", PLANTED)
def test_a_plain_cast_breaks_every_planted_graph(name: str):
    model, _, _ = PLANTED[name]
    assert apart(fp16_answers(cast_to_fp16(model), X), answers(model, {"x": X})[0]) > 0.01


@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_overflow_is_found_and_mended(name: str, tmp_path: Path):
    model, kind, node = PLANTED[name]
    onnx.save(model, tmp_path / "fp32.onnx")
    report = fp16_ready(tmp_path / "fp32.onnx", tmp_path / "mended.onnx", [{"x": X}, {"x": -X}])
    assert (kind, node) in {(finding.kind, finding.node) for finding in report.findings}
    mended = onnx.load(report.path)
    expected = answers(model, {"x": X})[0]
    np.testing.assert_allclose(answers(mended, {"x": X})[0], expected, atol=1e-5, rtol=1e-4)
    half = fp16_answers(cast_to_fp16(mended, report.keep_fp32), X)
    assert apart(half, expected) < 1e-4


def test_a_layer_norm_is_fused_where_it_can_be_and_kept_in_fp32_where_not(tmp_path: Path):
    reports = {}
    for name in ("layer norm, written out, an outlier channel", "layer norm over the channels"):
        onnx.save(PLANTED[name][0], tmp_path / "x.onnx")
        reports[name] = fp16_ready(tmp_path / "x.onnx", tmp_path / "y.onnx", [{"x": X}])
    fused, kept = reports.values()
    assert fused.fused == ("norm/Bias/LayerNormalization",)
    assert not set(fused.keep_fp32) & {"norm/Square", "norm/Variance"}
    assert kept.fused == ()
    assert {"norm/Square", "norm/Variance", "norm/Div"} <= set(kept.keep_fp32)


@pytest.mark.parametrize(("tower", "model"), [("image", image_tower()), ("text", text_tower())])
def test_a_healthy_tower_is_left_as_it_is(tower: str, model: onnx.ModelProto, tmp_path: Path):
    onnx.save(model, tmp_path / "x.onnx")
    report = fp16_ready(tmp_path / "x.onnx", tmp_path / "y.onnx", [tower_tensors(tower, 4)])
    assert (report.findings, report.keep_fp32, report.changed) == ((), (), False)
    assert report.path == str(tmp_path / "x.onnx")
    assert not (tmp_path / "y.onnx").exists()


def test_patterns_and_constants_are_found_without_a_sample():
    kinds = {name: {f.kind for f in lint_fp16(model)} for name, (model, _, _) in PLANTED.items()}
    blind = {name for name, (_, kind, _) in PLANTED.items() if kind not in kinds[name]}
    assert blind == {"residual stream with outliers", "an exponential", "the norm of long embeddings"}
    assert not any(f.certain for f in lint_fp16(PLANTED["RMS norm, written out"][0]))


def test_a_quantized_model_and_foreign_samples_are_refused(tmp_path: Path):
    model = graph_model(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantizer"),
         helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])],
        {"s": np.float32(1), "z": np.int8(0)},
    )  # fmt: skip
    onnx.save(model, tmp_path / "q.onnx")
    with pytest.raises(UserError, match=r"quantized already: node 'quantizer'.*give the FP32 model"):
        fp16_ready(tmp_path / "q.onnx", tmp_path / "y.onnx", [{"x": X}])
    onnx.save(PLANTED["an exponential"][0], tmp_path / "x.onnx")
    for samples, said in (([], "no sample"), ([{"z": X}], "do not fit"), ([{"x": X[0]}], "do not fit")):
        with pytest.raises(UserError, match=said):
            fp16_ready(tmp_path / "x.onnx", tmp_path / "y.onnx", samples)


def test_what_is_broken_in_fp32_already_is_named_where_it_begins():
    nodes = [
        helper.make_node("Log", ["x"], ["l"], name="log"),
        helper.make_node("Add", ["l", "l"], ["y"], name="after"),
    ]
    model = graph_model(nodes, {})
    found = lint_fp16(model, measured_ranges(model, [{"x": np.array([[[-1.0] * 8] * 4], np.float32)}]))
    assert [(f.kind, f.node, f.remedy) for f in found] == [("not-finite", "log", "mend-model")]
    assert "holds NaN" in found[0].why
    found = lint_fp16(model, measured_ranges(model, [{"x": np.zeros((1, 4, 8), np.float32)}]))
    assert "holds infinity" in found[0].why
    masked = graph_model(
        [helper.make_node("Log", ["x"], ["l"], name="log"), helper.make_node("Softmax", ["l"], ["y"])], {}
    )
    assert lint_fp16(masked, measured_ranges(masked, [{"x": np.eye(4, 8, dtype=np.float32)[None]}])) == ()
    assert lint_fp16(model, measured_ranges(model, [{"x": np.ones((1, 4, 8), np.float32)}])) == ()


def _found(nodes: list[onnx.NodeProto], weights: dict[str, Any], x: np.ndarray) -> set[tuple[str, str]]:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "length", "width"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return {(finding.kind, finding.node) for finding in lint_fp16(model, measured_ranges(model, [{"x": x}]))}


def _rms_norm(x: str, out: str, epsilon: str) -> list[onnx.NodeProto]:
    """Return ``x * (mean(x^2) + epsilon) ** -0.5``, as LLaMA's kin write it."""
    return [
        helper.make_node("Pow", [x, "two"], ["square"], "Square"),
        helper.make_node("ReduceMean", ["square", "last"], ["mean"], "Mean"),
        helper.make_node("Add", ["mean", epsilon], ["safe"], "Epsilon"),
        helper.make_node("Pow", ["safe", "minus_half"], ["inverse"], "Inverse"),
        helper.make_node("Mul", [x, "inverse"], [out], "Normed"),
    ]


_RMS: dict[str, Any] = {
    "two": np.float32(2),
    "last": np.array([-1]),
    "minus_half": np.float32(-0.5),
    "tiny": np.float32(1e-8),
    "large": np.full(WIDTH, 3e4, np.float32),
}


def test_a_norm_by_a_power_of_minus_a_half_is_seen_with_its_epsilon():
    found = _found(_rms_norm("x", "y", "tiny"), _RMS, X)
    assert found == {("decomposed-rms-norm", "Square"), ("vanishing-epsilon", "Epsilon")}


def test_what_the_scale_of_a_norm_makes_too_large_is_named():
    nodes = [*_rms_norm("x", "n", "tiny"), helper.make_node("Mul", ["n", "large"], ["y"], "Scale")]
    assert ("large-values", "Scale") in _found(nodes, _RMS, X)


def test_a_mean_over_a_free_dimension_is_summed_up_as_one_over_a_fixed_one():
    mean = helper.make_node("ReduceMean", ["x", "one"], ["y"], "Mean", keepdims=0)
    long = np.full((2, 600, 4), 200, np.float32)
    assert _found([mean], {"one": np.array([1])}, long) == {("large-sum", "Mean")}
    assert _found([mean], {"one": np.array([1])}, long[:, :60]) == set()


@pytest.mark.parametrize("op", ["ReduceLogSumExp", "ReduceLogSum"])
def test_a_sum_inside_a_logarithm_is_seen(op: str):
    nodes = [helper.make_node(op, ["x", "last"], ["y"], "Log")]
    weights = {"last": np.array([-1])}
    exponents = np.full((2, 3, 4), 12, np.float32)
    x = exponents if op == "ReduceLogSumExp" else np.exp(exponents) / 4
    found = _found(nodes, weights, x)
    assert ("large-sum", "Log") in found


def test_samples_are_cut_for_a_model_of_a_fixed_batch_and_those_that_do_not_fit_are_told_why(
    tmp_path: Path,
) -> None:
    value, out = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, WIDTH]) for name in ("x", "y")
    )
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"], "exp")], "main", [value], [out])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    rows = np.zeros((8, WIDTH), np.float32)
    rows[7] = 12
    np.savez(tmp_path / "x.npz", x=rows)
    found = lint_file(tmp_path / "m.onnx", data=tmp_path / "x.npz").findings
    assert [(finding.kind, finding.node) for finding in found] == [("large-values", "exp")]
    np.savez(tmp_path / "few.npz", x=rows[:3])
    with pytest.raises(UserError, match="Got: 3 Expected: 4"):
        lint_file(tmp_path / "m.onnx", data=tmp_path / "few.npz")


def test_a_branch_that_computes_is_kept_in_fp32_and_one_that_arranges_is_not():
    value = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)
    same = helper.make_graph([helper.make_node("Identity", ["x"], ["z"], "same")], "same", [], [value])
    square = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["z"], "square")], "square", [], [value])
    for branch, expected in ((square, [("inner-graph", "choice", "keep-fp32", False)]), (same, [])):
        choice = helper.make_node("If", ["yes"], ["y"], "choice", then_branch=branch, else_branch=same)
        found = lint_fp16(graph_model([choice], {"yes": np.array(True)}))
        assert [(f.kind, f.node, f.remedy, f.certain) for f in found] == expected
        assert all("square (Mul)" in f.why for f in found)


def test_a_mask_in_a_list_of_numbers_is_clamped(tmp_path: Path):
    nodes = [
        helper.make_node("Constant", [], ["mask"], "mask", value_floats=[0.0, -1e9]),
        helper.make_node("Concat", ["mask", "mask", "mask", "mask"], ["wide"], "wide", axis=0),
        helper.make_node("Add", ["x", "wide"], ["a"], "masked"),
        helper.make_node("Softmax", ["a"], ["y"], "softmax"),
    ]
    onnx.save(graph_model(nodes, {}), tmp_path / "m.onnx")
    x = normal(3, 4, 8, seed=7)
    report = fp16_ready(tmp_path / "m.onnx", tmp_path / "mended.onnx", [{"x": x}])
    assert report.clamped == ("mask",)
    assert (
        apart(answers(onnx.load(report.path), {"x": x})[0], answers(graph_model(nodes, {}), {"x": x})[0])
        < 1e-6
    )
    assert lint_fp16(onnx.load(report.path)) == ()
