"""If these fail, a user is told that a runtime fuses what it does not, or rewrites a model into another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from edgeglm.core.errors import UserError
from edgeglm.export.attention_scale import fold_scales
from edgeglm.export.engine_layers import EngineLayer, layers_from_file
from edgeglm.export.fusion import FusionReport, Runtime, fusion_report, rewritten_file
from edgeglm.export.gelus import gelus
from edgeglm.export.graph import Graph
from edgeglm.export.lowering import lane_a, lane_b
from edgeglm.export.ort_rewrites import rewrite_for_onnxruntime
from edgeglm.export.patterns import norms
from edgeglm.export.rewrites import merge_projections, rewrite
from scripts.fixtures.graphs import answers, graph_model, normal
from tests.export.blocks import WIDTH, N, block

X = normal(3, 6, WIDTH, seed=5)


def missed(report: FusionReport, runtime: Any) -> dict[str, tuple[str, str]]:
    return {row.pattern: (row.blocker, row.why) for row in report.missed(runtime)}


def test_each_pattern_is_listed_with_the_node_that_prevents_it():
    report = fusion_report(block())
    assert report.counts("tensorrt") == {
        "layer-norm": (2, 2), "gelu": (1, 1), "attention": (0, 1), "qkv-projections": (1, 1),
    }  # fmt: skip
    blocker, why = missed(report, "tensorrt")["attention"]
    assert blocker == "attention/Scale"
    assert "asks for it before" in why
    blocker, why = missed(report, "onnxruntime")["attention"]
    assert blocker == "query/Reshape"
    assert "number of heads" in why


def test_a_rewritten_block_answers_the_same_and_misses_nothing(tmp_path: Path):
    onnx.save(block(), tmp_path / "x.onnx")
    runtimes: tuple[Runtime, ...] = ("tensorrt", "onnxruntime")
    for runtime in runtimes:
        rewritten_file(tmp_path / "x.onnx", tmp_path / "y.onnx", runtime)
        made = onnx.load(tmp_path / "y.onnx")
        np.testing.assert_allclose(answers(made, {"x": X})[0], answers(block(), {"x": X})[0], atol=2e-6)
    report = fusion_report(onnx.load(tmp_path / "y.onnx"))
    assert report.onnxruntime_ops["MultiHeadAttention"] == 1
    rewritten_file(tmp_path / "x.onnx", tmp_path / "y.onnx", "tensorrt")
    assert fusion_report(onnx.load(tmp_path / "y.onnx")).missed("tensorrt") == ()


def test_a_block_that_was_written_out_is_put_together_again():
    old = lane_a(block()).model
    assert {node.op_type for node in old.graph.node} >= {"Erf", "Sqrt"}
    new = lane_b(old).model
    new.opset_import[0].version = 20
    done = rewrite(new)
    assert {kind: len(nodes) for kind, nodes in done.made.items()} == {
        "layer-norm": 2, "gelu": 1, "attention-scale": 1, "qkv-projections": 1,
    }  # fmt: skip
    assert sum(node.op_type == "MatMul" for node in new.graph.node) == 4
    np.testing.assert_allclose(answers(new, {"x": X})[0], answers(block(), {"x": X})[0], atol=2e-6)


def test_a_scale_is_not_folded_into_a_product_that_makes_keys_and_values_too():
    model = block()
    assert rewrite(model, (merge_projections,)).count("qkv-projections") == 1
    assert rewrite(model, (fold_scales,)).count("attention-scale") == 1
    np.testing.assert_allclose(answers(model, {"x": X})[0], answers(block(), {"x": X})[0], atol=2e-6)
    report = fusion_report(model)
    assert report.missed("tensorrt") == ()
    assert report.counts("tensorrt")["qkv-projections"] == (1, 1)


def test_a_constant_that_is_divided_by_the_product_is_no_scale_for_onnxruntime_either():
    model = block()
    scale = next(node for node in model.graph.node if node.name == "attention/Scale")
    scale.op_type, scale.input[:] = "Div", ["factor", "l"]
    expected = answers(model, {"x": X})[0]
    assert "divided by the product" in rewrite_for_onnxruntime(model).kept["attention/Softmax"]
    np.testing.assert_array_equal(answers(model, {"x": X})[0], expected)


def test_half_quantized_attention_names_the_side_that_is_not():
    model = block(int8=True, bmm_int8=("query", "key"))
    next(node for node in model.graph.node if node.name == "attention/Mask").input[0] = "l"
    report = fusion_report(model)
    blocker, why = missed(report, "tensorrt")["attention"]
    assert blocker == "bmm2"
    assert "probabilities are not quantized" in why


def test_a_residual_beside_an_int8_product_is_to_be_quantized_too():
    nodes = [
        N("Relu", ["x"], ["t"], name="trunk"),
        N("QuantizeLinear", ["t", "s", "z"], ["q"], name="q"),
        N("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"),
        N("MatMul", ["d", "w"], ["m"], name="product"),
        N("Add", ["m", "t"], ["y"], name="residual"),
    ]
    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": normal(8, 8)}
    found = missed(fusion_report(graph_model(nodes, weights)), "tensorrt")["quantized-residual"]
    assert found[0] == "trunk"
    assert found[1].startswith("the other side of the residual is not quantized")
    nodes[-1].input[1] = "d"
    assert missed(fusion_report(graph_model(nodes, weights)), "tensorrt") == {}


@pytest.mark.parametrize("shortcut", [0, 1])
def test_a_residual_between_two_products_is_the_side_that_a_third_reads(shortcut: int):
    """Inverted bottlenecks: no activation stands between a product and the sum, on either side."""
    nodes = [
        N("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        N("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"),
        N("MatMul", ["d", "w"], ["t"], name="before"),
        N("QuantizeLinear", ["t", "s", "z"], ["q2"], name="q2"),
        N("DequantizeLinear", ["q2", "s", "z"], ["d2"], name="dq2"),
        N("MatMul", ["d2", "w"], ["m"], name="product"),
        N("Add", ["t", "m"] if shortcut == 0 else ["m", "t"], ["y"], name="residual"),
    ]
    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": normal(8, 8)}
    blocker, why = missed(fusion_report(graph_model(nodes, weights)), "tensorrt")["quantized-residual"]
    assert blocker == "before"
    assert "let the sum read it too" in why


def test_embeddings_of_positions_behind_an_int8_product_are_no_residual():
    nodes = [
        N("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        N("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"),
        N("MatMul", ["d", "w"], ["m"], name="product"),
        N("Shape", ["x"], ["length"], name="length", start=1, end=2),
        N("Slice", ["table", "zero", "length", "zero"], ["rows"], name="positions"),
        N("Add", ["m", "rows"], ["y"], name="sum"),
    ]
    weights = {
        "s": np.float32(0.1), "z": np.int8(0), "w": normal(8, 8), "table": normal(16, 8),
        "zero": np.array([0], np.int64),
    }  # fmt: skip
    assert "quantized-residual" not in fusion_report(graph_model(nodes, weights)).counts("tensorrt")


def test_projections_that_are_quantized_apart_cannot_be_one_product():
    model = block(int8=True)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.07, np.float32), "other"))
    at = [node.name for node in model.graph.node].index("key/MatMul")
    for node in (
        N("DequantizeLinear", ["nq2", "other", "qz"], ["nd2"], name="second/Dequantize"),
        N("QuantizeLinear", ["n", "other", "qz"], ["nq2"], name="second/Quantize"),
    ):
        model.graph.node.insert(at, node)
    next(node for node in model.graph.node if node.name == "key/MatMul").input[0] = "nd2"
    assert missed(fusion_report(model), "tensorrt")["qkv-projections"][0] == "key/MatMul"


def test_quantizers_in_the_wrong_place_are_pointed_out():
    nodes = [
        N("Conv", ["x", "w"], ["c"], name="conv"),
        N("QuantizeLinear", ["c", "s", "z"], ["q"], name="wrong/Quantize"),
        N("DequantizeLinear", ["q", "s", "z"], ["d"], name="wrong/Dequantize"),
        N("BatchNormalization", ["d", "one", "zero", "zero", "one"], ["b"], name="norm"),
        N("Relu", ["b"], ["r"], name="relu"),
        N("QuantizeLinear", ["r", "s", "z"], ["q2"], name="first/Quantize"),
        N("DequantizeLinear", ["q2", "s", "z"], ["d2"], name="first/Dequantize"),
        N("QuantizeLinear", ["d2", "s", "z"], ["q3"], name="again/Quantize"),
        N("DequantizeLinear", ["q3", "s", "z"], ["y"], name="again/Dequantize"),
    ]
    weights = {
        "w": normal(4, 3, 1, 1), "s": np.float32(0.1), "z": np.int8(0),
        "one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32),
    }  # fmt: skip
    report = fusion_report(graph_model(nodes, weights, shape=("B", 3, 5, 5)))
    notes = {note.node: note.why for note in report.quantizers}
    assert (
        "inside the conv-batch-norm" in notes["wrong/Quantize"] or "between conv" in notes["wrong/Quantize"]
    )
    assert "quantizes again" in notes["again/Quantize"]
    assert "first/Quantize" not in notes
    assert missed(report, "tensorrt")["conv-batch-norm"][0].startswith("wrong/")


def conv(*, shared: bool = False, grouped: bool = False) -> onnx.ModelProto:
    nodes = [
        N("Conv", ["x", "w", "b"], ["c"], name="conv", group=3 if grouped else 1),
        N("BatchNormalization", ["c", "g", "h", "m", "v"], ["y"], name="norm", epsilon=1e-3),
        *([N("Relu", ["c"], ["z"], name="other")] if shared else []),
    ]
    weights = {
        "w": normal(6, 1 if grouped else 3, 2, 2), "b": normal(6), "g": normal(6, seed=1),
        "h": normal(6, seed=2), "m": normal(6, seed=3), "v": np.abs(normal(6, seed=4)),
    }  # fmt: skip
    return graph_model(nodes, weights, shape=("B", 3, 5, 5), outputs=("y", "z") if shared else ("y",))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_batch_norm_goes_into_its_convolution(grouped: bool):
    model = conv(grouped=grouped)
    done = rewrite(model)
    assert done.made == {"conv-batch-norm": ["conv"]}
    assert [node.op_type for node in model.graph.node] == ["Conv"]
    x = normal(2, 3, 5, 5)
    np.testing.assert_allclose(
        answers(model, {"x": x})[0], answers(conv(grouped=grouped), {"x": x})[0], atol=1e-5
    )


def test_what_is_read_elsewhere_is_not_fused_and_says_so():
    model = conv(shared=True)
    row = missed(fusion_report(model), "tensorrt")["conv-batch-norm"]
    assert row == ("conv", "other reads its result too; compute it apart there")
    assert rewrite(model).kept == {"norm": "conv is read elsewhere too"}


def test_gelu_is_known_in_the_forms_that_exporters_write():
    half, root = np.float32(0.5), np.float32(2**0.5)
    forms = {
        "x first": [
            N("Div", ["x", "root"], ["a"]), N("Erf", ["a"], ["e"]), N("Add", ["e", "one"], ["f"]),
            N("Mul", ["x", "f"], ["g"]), N("Mul", ["g", "half"], ["y"]),
        ],
        "half first": [
            N("Mul", ["x", "half"], ["h"]), N("Mul", ["x", "inverse"], ["a"]), N("Erf", ["a"], ["e"]),
            N("Add", ["e", "one"], ["f"]), N("Mul", ["h", "f"], ["y"]),
        ],
    }  # fmt: skip
    for nodes in forms.values():
        weights = {"half": half, "root": root, "inverse": 1 / root, "one": np.float32(1)}
        model = graph_model(nodes, weights)
        x = normal(2, 4, 8)
        before = answers(model, {"x": x})[0]
        (match,) = gelus(Graph(model))
        assert (match.input, match.output, len(match.nodes)) == ("x", "y", 5)
        rewrite(model)
        assert [node.op_type for node in model.graph.node] == ["Gelu"]
        np.testing.assert_allclose(answers(model, {"x": x})[0], before, atol=1e-6)
    other = graph_model([N("Tanh", ["x"], ["t"]), N("Add", ["t", "one"], ["y"])], {"one": np.float32(1)})
    assert list(gelus(Graph(other))) == []


@pytest.mark.parametrize("factor_first", [True, False])
def test_the_gelu_of_clip_is_found_and_left_as_it_is(factor_first: bool):
    """x * sigmoid(1.702 x) is not what the operator Gelu computes."""
    nodes = [
        N("Mul", ["k", "x"] if factor_first else ["x", "k"], ["a"], name="a"), N("Sigmoid", ["a"], ["s"]),
        N("Mul", ["x", "s"] if factor_first else ["s", "x"], ["y"], name="product"),
    ]  # fmt: skip
    model = graph_model(nodes, {"k": np.float32(1.702)})
    (match,) = gelus(Graph(model))
    assert (match.input, match.output, len(match.nodes)) == ("x", "y", 3)
    report = fusion_report(model)
    assert {row.runtime: row.fused for row in report.rows} == {"onnxruntime": True, "tensorrt": True}
    assert "QuickGelu" in {row.into for row in report.rows}
    assert rewrite(model).made == {}
    for weights in ({"k": np.float32(1.0)}, {"k": normal(8)}):  # SiLU, and something else
        assert list(gelus(Graph(graph_model(nodes, weights)))) == []
    nodes[2].input[:] = ["z", "s"]
    assert list(gelus(Graph(graph_model(nodes, {"k": np.float32(1.702), "z": normal(8)})))) == []


def embedded() -> onnx.ModelProto:
    """Token and place are looked up, summed up and normalized; then a residual is."""
    nodes = [
        N("Gather", ["tokens", "ids"], ["t"], name="tokens"),
        N("Gather", ["places", "ids"], ["p"], name="places"),
        N("Add", ["t", "p"], ["e"], name="sum"),
        N("LayerNormalization", ["e", "s", "b"], ["n"], name="norm"),
        N("Relu", ["n"], ["r"], name="relu"),
        N("Add", ["n", "r"], ["a"], name="residual"),
        N("LayerNormalization", ["a", "s", "b"], ["y"], name="norm2"),
    ]
    weights = {"tokens": normal(40, 8), "places": normal(40, 8, seed=1), "s": normal(8), "b": normal(8)}
    return graph_model(nodes, weights, inputs={"ids": (TensorProto.INT64, ["B", 4])})


def test_sums_before_a_norm_are_named_for_both_runtimes():
    report = fusion_report(embedded())
    found = {(row.pattern, row.runtime): row for row in report.rows}
    for pattern, at in (("embedding-layer-norm", "sum"), ("skip-layer-norm", "residual")):
        row = found[pattern, "tensorrt"]
        assert (row.at, row.applies, row.fused) == (at, False, False)
        assert row.into.startswith("not applicable")
        assert found[pattern, "onnxruntime"].at == at
    assert report.missed("tensorrt") == ()
    assert report.counts("tensorrt") == {"layer-norm": (2, 2)}
    assert found["skip-layer-norm", "onnxruntime"].fused


def test_the_operator_rms_norm_is_a_norm_that_tensorrt_wants_written_out():
    model = graph_model([N("RMSNormalization", ["x", "s"], ["y"], name="rms")], {"s": normal(8)}, opset=23)
    (match,) = norms(Graph(model))
    assert (match.kind, match.decomposed, match.tensors["scale"]) == ("rms-norm", False, "s")
    report = fusion_report(model)
    assert report.counts("onnxruntime") == {"rms-norm": (1, 1)}
    blocker, why = missed(report, "tensorrt")["rms-norm"]
    assert blocker == "rms"
    assert "edgeglm lower --lane B" in why
    assert "RMSNormalization" not in {node.op_type for node in lane_b(model).model.graph.node}


def test_a_softmax_without_products_and_a_norm_of_something_else_are_left():
    model = graph_model(
        [N("Softmax", ["x"], ["s"]), N("Sqrt", ["s"], ["r"]), N("Div", ["x", "r"], ["y"])], {}
    )
    assert list(norms(Graph(model))) == []
    assert fusion_report(model).rows == ()
    assert rewrite_for_onnxruntime(model).made == {}


def test_the_layers_of_an_engine_are_joined(tmp_path: Path):
    model = lane_b(lane_a(block()).model).model
    table = {
        "Layers": [
            {"Name": "myl0", "Metadata": "[ONNX Layer: norm/Pow]\x1e[ONNX Layer: norm/Sub]"},
            {"Name": "myl1", "LayerType": "kgen", "Metadata": "[ONNX Layer: norm/Div]",
             "Outputs": [{"Format/Datatype": "Half"}]},
            "bmm1 + attention/Scale",
        ]
    }  # fmt: skip
    (tmp_path / "layers.json").write_text(json.dumps(table))
    layers = layers_from_file(tmp_path / "layers.json")
    assert layers[1].precision == "Half"
    assert layers[2] == EngineLayer(name="bmm1 + attention/Scale", nodes=("bmm1", "attention/Scale"))
    rows = {row.at: row for row in fusion_report(model, layers=layers).rows if row.runtime == "tensorrt"}
    assert set(rows["norm/Add_2"].layers) == {"myl0", "myl1"}
    assert rows["attention/Softmax"].layers == ("bmm1 + attention/Scale",)
    newer = {
        "Layers": [{"Name": "l", "Outputs": [{"Format": "Row major", "DataType": "Int8"}]}]
    }  # TensorRT 11
    (tmp_path / "layers.json").write_text(json.dumps(newer))
    assert layers_from_file(tmp_path / "layers.json")[0].precision == "Int8 Row major"
    for text in ("{}", "no", '{"Layers": [1]}'):
        (tmp_path / "layers.json").write_text(text)
        with pytest.raises(UserError, match="write them with trtexec"):
            layers_from_file(tmp_path / "layers.json")


def test_an_fp16_graph_is_not_called_fused_for_the_casts_that_rename_it():
    nodes = [
        N("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        N("MatMul", ["h", "w"], ["k"], name="k"),
        N("Transpose", ["k"], ["t"], name="t", perm=[0, 2, 1]),
        N("MatMul", ["h", "t"], ["l"], name="bmm1"),
        N("Softmax", ["l"], ["p"], name="softmax"),
        N("MatMul", ["p", "k"], ["o"], name="bmm2"),
        N("Cast", ["o"], ["y"], to=TensorProto.FLOAT),
    ]
    report = fusion_report(graph_model(nodes, {"w": normal(8, 8).astype(np.float16)}))
    assert report.counts("onnxruntime") == {"attention": (0, 1)}
