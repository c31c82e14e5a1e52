"""If these fail, a pass takes what only looks like a pattern for one, and the model answers otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper

from edgeglm.export.fusion import fusion_report, rewritten_file
from edgeglm.export.gelus import gelus
from edgeglm.export.graph import Graph
from edgeglm.export.ort_rewrites import rewrite_for_onnxruntime
from edgeglm.export.rewrites import rewrite
from scripts.fixtures.graphs import answers, graph_model, normal

N = helper.make_node
X = normal(2, 4, 8, seed=3)
Weights = dict[str, Any]


def _norm(
    centre: list[int], spread: list[int], scale: npt.NDArray[np.float32] | None = None, opset: int = 20
) -> onnx.ModelProto:
    """(x - mean over some axes) / sqrt(mean of squares over others), times a scale."""
    weights: Weights = {"epsilon": np.float32(1e-5)}
    means: list[dict[str, Any]] = [{"axes": centre}, {"axes": spread}]
    extra: tuple[list[str], list[str]] = [], []
    if opset >= 18:
        weights |= {"centre": np.array(centre), "spread": np.array(spread)}
        means, extra = [{}, {}], (["centre"], ["spread"])
    nodes = [
        N("ReduceMean", ["x", *extra[0]], ["mean"], "mean", **means[0]),
        N("Sub", ["x", "mean"], ["c"], "centred"),
        N("Mul", ["c", "c"], ["square"], "square"),
        N("ReduceMean", ["square", *extra[1]], ["variance"], "variance", **means[1]),
        N("Add", ["variance", "epsilon"], ["safe"], "safe"),
        N("Sqrt", ["safe"], ["root"], "root"),
        N("Div", ["c", "root"], ["y" if scale is None else "n"], "normed"),
    ]
    if scale is not None:
        nodes.append(N("Mul", ["n", "scale"], ["y"], "scaled"))
        weights["scale"] = scale
    return graph_model(nodes, weights, opset=opset)


@pytest.mark.parametrize(("centre", "spread"), [([1], [-1]), ([-1], [1, 2]), ([1, 2], [-1])])
def test_a_mean_over_other_axes_than_the_variance_makes_no_layer_norm(
    centre: list[int], spread: list[int]
) -> None:
    model = _norm(centre, spread)
    expected = answers(model, {"x": X})[0]
    assert "layer-norm" not in rewrite(model).made
    np.testing.assert_allclose(answers(model, {"x": X})[0], expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8), (4, 1), (4, 8), (2, 1, 1, 8), (1, 1, 1, 8)])
def test_a_norm_is_fused_whatever_its_scale_is_spread_over(shape: tuple[int, ...]) -> None:
    model = _norm([-1], [-1], normal(*shape, seed=5))
    expected = answers(model, {"x": X})[0]
    kept = rewrite(model).kept
    actual = answers(model, {"x": X})[0]
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert list(kept.values()) == (
        ["its scale has more dimensions than its input"] if shape[:3] == (1, 1, 1) else []
    )


@pytest.mark.parametrize(
    ("axes", "opset", "remedy"),
    [
        ([-1], 20, "fuse it: edgeglm fusions --write"),
        ([-1], 14, "opset 14 has no LayerNormalization, so raise it first: edgeglm lower --lane B"),
        ([1], 20, "it goes over other axes than the last ones, so keep it in FP32"),
    ],
)
def test_a_norm_that_is_written_out_has_a_remedy_that_works(axes: list[int], opset: int, remedy: str) -> None:
    row = fusion_report(_norm(axes, axes, opset=opset)).missed("tensorrt")[0]
    assert row.why.endswith(remedy)


def _by_erf(divisor: float, *halves: float) -> onnx.ModelProto:
    """x (1 + erf(x / divisor)), times each of ``halves``."""
    nodes = [
        N("Div", ["x", "divisor"], ["d"], "divided"),
        N("Erf", ["d"], ["e"], "curve"),
        N("Add", ["e", "one"], ["a"], "added"),
        N("Mul", ["x", "a"], ["m0"], "product"),
        *(N("Mul", [f"m{i}", f"h{i}"], [f"m{i + 1}"], f"half{i}") for i in range(len(halves))),
        N("Identity", [f"m{len(halves)}"], ["y"], "out"),
    ]
    weights = {"divisor": np.float32(divisor), "one": np.float32(1)}
    return graph_model(nodes, weights | {f"h{i}": np.float32(half) for i, half in enumerate(halves)})


def _by_tanh(factor: float, cubic: float) -> onnx.ModelProto:
    nodes = [
        N("Pow", ["x", "three"], ["p"], "cube"),
        N("Mul", ["p", "cubic"], ["c"], "cubic"),
        N("Add", ["x", "c"], ["s"], "sum"),
        N("Mul", ["s", "factor"], ["f"], "factor"),
        N("Tanh", ["f"], ["t"], "curve"),
        N("Add", ["t", "one"], ["a"], "added"),
        N("Mul", ["x", "a"], ["m"], "product"),
        N("Mul", ["m", "half"], ["y"], "half"),
    ]
    numbers = {"three": 3, "cubic": cubic, "factor": factor, "one": 1, "half": 0.5}
    return graph_model(nodes, {name: np.float32(value) for name, value in numbers.items()})


def _of_a_sum() -> onnx.ModelProto:
    """0.5 x (1 + erf((x + bias) / sqrt 2)): the bias is no part of GELU."""
    model = _by_erf(1.4142135, 0.5)
    model.graph.node.insert(0, N("Add", ["x", "bias"], ["b"], "shifted"))
    model.graph.node[1].input[0] = "b"
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(8, seed=1), "bias"))
    return model


@pytest.mark.parametrize(
    ("model", "is_gelu"),
    [
        (_by_erf(1.4142135, 0.5), True),
        (_by_erf(2.0, 0.5), False),
        (_by_erf(1.4142135, 0.5, 0.5), True),  # and half of it
        (_by_tanh(0.7978845, 0.044715), True),
        (_by_tanh(0.7978845, 0.1), False),
        (_by_tanh(1.0, 0.044715), False),
        (_of_a_sum(), False),
    ],
)
def test_a_curve_with_other_numbers_is_no_gelu(model: onnx.ModelProto, is_gelu: bool) -> None:
    expected = answers(model, {"x": X})[0]
    assert bool(list(gelus(Graph(model)))) == is_gelu
    assert ("gelu" in rewrite(model).made) == is_gelu
    np.testing.assert_allclose(answers(model, {"x": X})[0], expected, atol=1e-3)


def test_a_norm_over_two_dimensions_keeps_its_residual_apart_for_onnxruntime() -> None:
    nodes = [
        N("Relu", ["x"], ["r"], "relu"),
        N("Add", ["x", "r"], ["a"], "residual"),
        N("LayerNormalization", ["a", "scale"], ["y"], "norm", axis=1),
    ]
    model = graph_model(nodes, {"scale": normal(4, 8, seed=1)})
    expected = answers(model, {"x": X})[0]
    rewrite_for_onnxruntime(model)
    np.testing.assert_allclose(answers(model, {"x": X})[0], expected, atol=1e-5)


@pytest.mark.parametrize("opset", [13, 14, 20])
def test_masked_attention_is_fused_for_onnxruntime_in_every_opset(opset: int) -> None:
    weights: Weights = {
        "split": np.array([0, 0, 2, 4]), "merge": np.array([0, 0, 8]), "factor": np.float32(0.5),
        "mask": np.array([0, 0, -1e4, 0], np.float32).reshape(1, 1, 1, 4),
    }  # fmt: skip
    nodes = []
    for index, (role, perm) in enumerate((("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))):
        weights[f"{role}.w"] = normal(8, 8, seed=index, scale=0.5)
        nodes += [
            N("MatMul", ["x", f"{role}.w"], [f"{role}m"], f"{role}/MatMul"),
            N("Reshape", [f"{role}m", "split"], [f"{role}r"], f"{role}/Reshape"),
            N("Transpose", [f"{role}r"], [role], f"{role}/Transpose", perm=perm),
        ]
    nodes += [
        N("MatMul", ["q", "k"], ["s"], "scores"),
        N("Mul", ["s", "factor"], ["f"], "scale"),
        N("Add", ["f", "mask"], ["masked"], "mask"),
        N("Softmax", ["masked"], ["p"], "softmax", axis=-1),
        N("MatMul", ["p", "v"], ["o"], "values"),
        N("Transpose", ["o"], ["t"], "back", perm=[0, 2, 1, 3]),
        N("Reshape", ["t", "merge"], ["y"], "merge"),
    ]
    model = graph_model(nodes, weights, opset=opset)
    expected = answers(model, {"x": X})[0]
    assert rewrite_for_onnxruntime(model).made == {"attention": ["softmax/MultiHeadAttention"]}
    np.testing.assert_allclose(answers(model, {"x": X})[0], expected, atol=1e-5)


def test_attention_whose_hidden_rows_are_guarded_is_listed_with_its_guard() -> None:
    nodes = [
        N("Transpose", ["x"], ["k"], "keys", perm=[0, 2, 1]),
        N("MatMul", ["x", "k"], ["s"], "scores"),
        N("Softmax", ["s"], ["p"], "softmax"),
        N("IsNaN", ["p"], ["nan"], "asked"),
        N("Where", ["nan", "zero", "p"], ["w"], "guarded"),
        N("MatMul", ["w", "x"], ["y"], "values"),
    ]
    report = fusion_report(graph_model(nodes, {"zero": np.float32(0)}))
    assert [(row.pattern, row.blocker) for row in report.missed("tensorrt")] == [("attention", "softmax")]
    assert "asked reads its result too" in report.missed("tensorrt")[0].why


def test_a_file_whose_output_has_no_shape_is_rewritten_and_given_one(tmp_path: Path) -> None:
    model = _norm([-1], [-1])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "in.onnx")
    done = rewritten_file(tmp_path / "in.onnx", tmp_path / "out.onnx", "tensorrt")
    assert list(done.made) == ["layer-norm"]
    made = onnx.load(tmp_path / "out.onnx")
    assert len(made.graph.output[0].type.tensor_type.shape.dim) == 3
