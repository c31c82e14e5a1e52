"""If these fail, a board with TensorRT 8.5 gets a file that it cannot parse, or that answers otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.export.attention import attentions
from edgeglm.export.graph import Graph
from edgeglm.export.lanes import checked_lane, lane_file, lane_problems, parsed_operators
from edgeglm.export.lowering import lane_a, lane_a_from_onnx, lane_b, raised
from edgeglm.targets.schema import Lane, load_target
from scripts.fixtures.graphs import answers, graph_model, normal
from scripts.fixtures.planted import fp16_answers
from tests.calibration.towers import image_tower, text_tower, tower_tensors

N = helper.make_node
VECTOR = {"s": normal(8, seed=1), "b": normal(8, seed=2)}
CHANNELS = {"s": normal(4, seed=1), "b": normal(4, seed=2)}
ONE = np.array([1], np.int64)


def specified(model: onnx.ModelProto, x: Any) -> Any:
    outputs: Any = ReferenceEvaluator(model).run(None, {"x": x})
    return outputs[0]


# name: (nodes, weights, opset)
NEWER: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], int]] = {
    "layernorm": ([N("LayerNormalization", ["x", "s", "b"], ["y"])], VECTOR, 20),
    "layernorm over two axes": (
        [N("LayerNormalization", ["x", "w"], ["y"], axis=1, epsilon=1e-3)], {"w": normal(4, 8)}, 17,
    ),
    "layernorm with its moments": (
        [N("LayerNormalization", ["x", "s", "b"], ["y0", "m", "v"]), N("Add", ["m", "v"], ["y"])], VECTOR, 17,
    ),
    "rmsnorm": ([N("RMSNormalization", ["x", "s"], ["y"])], {"s": VECTOR["s"]}, 23),
    "groupnorm": ([N("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)], CHANNELS, 21),
    "gelu": ([N("Gelu", ["x"], ["y"])], {}, 20),
    "gelu by tanh": ([N("Gelu", ["x"], ["y"], approximate="tanh")], {}, 20),
    "swish": ([N("Swish", ["x"], ["y"], alpha=1.5)], {}, 24),
    "mish": ([N("Mish", ["x"], ["y"])], {}, 18),
    "mean over an axis": ([N("ReduceMean", ["x", "a"], ["y"], keepdims=0)], {"a": ONE}, 20),
    "mean of all": ([N("ReduceMean", ["x"], ["y"])], {}, 20),
    "mean of nothing": ([N("ReduceMean", ["x"], ["y"], noop_with_empty_axes=1)], {}, 20),
    "norm": ([N("ReduceL2", ["x", "a"], ["y"])], {"a": ONE}, 18),
    "unequal split": ([N("Split", ["x"], ["y", "z"], axis=1, num_outputs=2)], {}, 18),
    "pad of one axis": (
        [N("Pad", ["x", "p", "", "a"], ["y"])], {"p": np.array([1, 2], np.int64), "a": ONE}, 18,
    ),
    "equal": ([N("Equal", ["x", "x"], ["e"]), N("Cast", ["e"], ["y"], to=1)], {}, 19),
    "cast like": ([N("CastLike", ["i", "x"], ["y"])], {"i": np.arange(8)}, 19),
    "attention": (
        [N("Attention", ["x", "x", "x"], ["y"], q_num_heads=2, kv_num_heads=2)], {}, 23,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEWER)
def test_an_operator_newer_than_the_lane_is_written_with_older_ones(name: str):
    nodes, weights, opset = NEWER[name]
    model = graph_model(nodes, weights, opset=opset, shape=(2, 4, 8) if name == "attention" else ("B", 4, 8))
    lowered = lane_a(model)
    assert {e.domain: e.version for e in lowered.model.opset_import} == {"": 16}
    assert lane_problems(lowered.model, "A") == ()
    x = normal(2, 4, 8)
    expected = specified(model, x)
    (actual, *_) = answers(lowered.model, {"x": x})
    np.testing.assert_allclose(actual, expected, atol=3e-6, rtol=1e-5)


REGIONS = {
    "regions": np.array([[0, 0, 3, 5], [1, 1, 4, 7]], np.float32), "of": np.array([0, 1], np.int64),
    "sizes": np.array([2, 3, 9, 5], np.int64),
    "grid": np.random.default_rng(0).uniform(-1.2, 1.2, (2, 4, 5, 2)).astype(np.float32),
}  # fmt: skip
ROI_ALIGN = N("RoiAlign", ["x", "regions", "of"], ["y"], output_height=2, output_width=2)
LINEAR, CUBIC = (N("Resize", ["x", "", "", "sizes"], ["y"], mode=mode) for mode in ("linear", "cubic"))
SAMPLED = N("GridSample", ["x", "grid"], ["y"])


@pytest.mark.parametrize(
    ("node", "opset"),
    [
        *((ROI_ALIGN, opset) for opset in (11, 13, 15, 16, 20)),
        *((LINEAR, opset) for opset in (13, 15, 18, 20)),
        *((CUBIC, opset) for opset in (13, 19)),
        *((SAMPLED, opset) for opset in (16, 18, 20)),
        (N("GridSample", ["x", "grid"], ["y"], mode="bicubic", padding_mode="border"), 16),
        (N("GridSample", ["x", "grid"], ["y"], mode="cubic", align_corners=1), 20),
    ],
)
def test_an_operator_whose_defaults_or_words_changed_answers_the_same(node: onnx.NodeProto, opset: int):
    weights = {name: value for name, value in REGIONS.items() if name in node.input}
    model = graph_model([node], weights, opset=opset, shape=(2, 3, 6, 8))
    x = normal(2, 3, 6, 8)
    before = answers(model, {"x": x})[0]
    for lowered in (lane_a(model), lane_b(model)):
        assert lowered.opset in (16, 19, 20)
        np.testing.assert_allclose(answers(lowered.model, {"x": x})[0], before, atol=1e-6)


@pytest.mark.parametrize(("tower", "model"), [("image", image_tower()), ("text", text_tower())])
def test_a_tower_answers_the_same_on_lane_a(tower: str, model: onnx.ModelProto, tmp_path: Path):
    onnx.save(model, tmp_path / "b.onnx")
    lane_a_from_onnx(tmp_path / "b.onnx", tmp_path / "a.onnx")
    report = checked_lane(
        tmp_path / "a.onnx",
        "A",
        target=load_target("jetson-agx-xavier"),
        reference=tmp_path / "b.onnx",
        batches=[tower_tensors(tower, count) for count in (1, 5)],
    )
    assert report.max_abs is not None
    assert report.max_abs < 1e-5


def test_every_step_of_a_normalization_is_named_to_stay_in_fp32():
    model = graph_model([N("LayerNormalization", ["x", "s", "b"], ["y"], name="norm")], VECTOR)
    lowered = lane_a(model)
    assert [name.removeprefix("norm/") for name in lowered.fp32_nodes] == [
        "ReduceMean", "Sub", "Pow", "ReduceMean_2", "Add", "Sqrt", "Div",
    ]  # fmt: skip
    names = {node.name for node in lowered.model.graph.node}
    assert names >= set(lowered.fp32_nodes)


def test_names_that_trtexec_would_cut_are_made_whole():
    model = graph_model([N("LayerNormalization", ["x", "s", "b"], ["y"], name="a:0, b")], VECTOR)
    assert lane_a(model).fp32_nodes[0] == "a_0__b/ReduceMean"


def quantized(weight_type: Any = np.int8, *, zero: int = 0, narrow: bool = True) -> onnx.ModelProto:
    kind = np.float16 if narrow else np.float32
    nodes = [
        N("Cast", ["x"], ["h"], to=TensorProto.FLOAT16 if narrow else TensorProto.FLOAT),
        N("Cast", ["h"], ["f"], to=TensorProto.FLOAT),
        N("QuantizeLinear", ["f", "sf", "z"], ["q"], name="quantize"),
        N("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantize"),
        N("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1, name="weight"),
        N("MatMul", ["d", "wd"], ["m"], name="product"),
        N("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = {
        "s": np.array(0.03, kind),
        "sf": np.array(0.03, kind).astype(np.float32),
        "z": np.array(zero, np.int8),
        "w": np.random.default_rng(0).integers(-127, 128, (8, 6)).astype(weight_type),
        "ws": np.abs(normal(6, scale=0.01)).astype(kind) + np.array(1e-3, kind),
        "wz": np.zeros(6, weight_type),
    }
    return graph_model(nodes, weights)


def test_int8_weights_become_floats_that_quantize_to_the_same_integers():
    model = quantized()
    lowered = lane_a(model)
    assert (lowered.quantized, lane_problems(lowered.model, "A")) == (1, ())
    x = normal(2, 4, 8).astype(np.float16).astype(np.float32)
    before = answers(model, {"x": x})[0]
    np.testing.assert_allclose(answers(lowered.model, {"x": x})[0], before, rtol=2e-3, atol=1e-3)
    (pair,) = [node for node in lowered.model.graph.node if node.name == "weight/QuantizeLinear"]
    opened = onnx.ModelProto()
    opened.CopyFrom(lowered.model)
    opened.graph.output.append(onnx.ValueInfoProto(name=pair.output[0]))
    integers = answers(opened, {"x": normal(2, 4, 8)})[-1]
    original = next(t for t in model.graph.initializer if t.name == "w")
    np.testing.assert_array_equal(integers, onnx.numpy_helper.to_array(original))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (graph_model([N("Unique", ["x"], ["y"], name="odd")], {}, opset=16), "odd.*has no Unique"),
        (
            graph_model(
                [N("Cast", ["x"], ["i"], to=TensorProto.INT32), N("BitwiseNot", ["i"], ["n"], name="bits"),
                 N("Cast", ["n"], ["y"], to=1)], {}, opset=18,
            ),
            "'bits' .BitwiseNot. cannot be written for opset 16: it came with opset 18 and has no equivalent",
        ),
        (graph_model([N("Pad", ["x", "p"], ["y"], mode="wrap")], {"p": np.zeros(6, np.int64)}),
         "no mode 'wrap'"),
        (
            graph_model([N("Split", ["x"], ["y", "z"], axis=0, num_outputs=2, name="halves")], {}),
            "'halves'.*the dimension that it splits is unknown; export with that dimension fixed",
        ),
        (graph_model([N("Gelu", ["x"], ["y"], domain="com.microsoft")], {}), "operator of one runtime"),
        (quantized(zero=3), "zero point that is not 0"),
        (quantized(np.uint8), "quantizes to uint8, which TensorRT does not take"),
    ],
)  # fmt: skip
def test_what_has_no_equivalent_is_refused_by_name(model: onnx.ModelProto, message: str, tmp_path: Path):
    onnx.save(model, tmp_path / "x.onnx")

    def lowered_and_checked() -> None:
        lane_a_from_onnx(tmp_path / "x.onnx", tmp_path / "out.onnx")
        checked_lane(tmp_path / "out.onnx", "A")

    with pytest.raises(UserError, match=message):
        lowered_and_checked()


def test_weights_that_were_left_behind_are_missed_at_once(tmp_path: Path):
    model = graph_model([N("MatMul", ["x", "w"], ["y"])], {"w": normal(8, 8)})
    onnx.save(model, tmp_path / "x.onnx", save_as_external_data=True, location="x.bin", size_threshold=0)
    lane_a_from_onnx(tmp_path / "x.onnx", tmp_path / "whole.onnx")
    assert not any(t.external_data for t in onnx.load(tmp_path / "whole.onnx").graph.initializer)
    (tmp_path / "x.bin").unlink()
    with pytest.raises(UserError, match=r"keeps weights in other files.*copy the files"):
        lane_a_from_onnx(tmp_path / "x.onnx", tmp_path / "out.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for name, said in (("broken", "no ONNX model"), ("absent", "no ONNX file")):
        with pytest.raises(UserError, match=said):
            lane_a_from_onnx(tmp_path / f"{name}.onnx", tmp_path / "out.onnx")


def test_lane_b_raises_old_files_and_lowers_new_ones():
    old = graph_model([N("ReduceMean", ["x"], ["m"], axes=[1]), N("Relu", ["m"], ["y"])], {}, opset=13)
    new = graph_model([N("RMSNormalization", ["x", "s"], ["y"])], {"s": VECTOR["s"]}, opset=23)
    for model, opset in ((old, 19), (new, 20)):
        made = lane_b(model)
        assert made.opset == opset
        assert lane_problems(made.model, "B", load_target("jetson-orin-nano")) == ()
        expected = specified(model, normal(2, 4, 8))
        np.testing.assert_allclose(answers(made.model, {"x": normal(2, 4, 8)})[0], expected, atol=1e-5)


def test_an_fp16_norm_that_is_written_out_computes_in_fp32():
    nodes = [
        N("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        N("RMSNormalization", ["h", "s"], ["n"], axis=2, name="norm"),
        N("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
    ]
    model = graph_model(nodes, {"s": VECTOR["s"].astype(np.float16)}, opset=23)
    made = lane_b(model)
    assert lane_problems(made.model, "B") == ()
    x = normal(2, 4, 8, scale=500.0)
    wide = graph_model([N("RMSNormalization", ["x", "s"], ["y"])], {"s": VECTOR["s"]}, opset=23)
    np.testing.assert_allclose(fp16_answers(made.model, x), specified(wide, x), rtol=3e-3, atol=1e-3)


def test_a_graph_that_mixes_types_is_no_lane_b():
    model = graph_model(
        [N("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), N("MatMul", ["h", "w"], ["y"], name="product")],
        {"w": normal(8, 8).astype(np.float16)},
        out_dtype=TensorProto.FLOAT16,
    )
    assert lane_problems(model, "B") == ()
    next(t for t in model.graph.initializer if t.name == "w").CopyFrom(
        onnx.numpy_helper.from_array(normal(8, 8), "w")
    )
    (problem,) = lane_problems(model, "B")
    assert "onnx.checker refuses it" in problem


def test_a_lane_is_refused_with_every_reason(tmp_path: Path):
    onnx.save(text_tower(), tmp_path / "b.onnx")
    with pytest.raises(UserError, match=r"opset 20, and lane A takes 13 to 16; node .*LayerNormalization"):
        checked_lane(tmp_path / "b.onnx", "A")
    with pytest.raises(UserError, match="does not take lane B"):
        checked_lane(tmp_path / "b.onnx", "B", target=load_target("jetson-agx-xavier"))
    other = text_tower()
    other.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(normal(600, 32, seed=9), other.graph.initializer[0].name)
    )
    onnx.save(other, tmp_path / "c.onnx")
    with pytest.raises(EdgeglmError, match="answers otherwise"):
        checked_lane(
            tmp_path / "b.onnx", "B", reference=tmp_path / "c.onnx", batches=[tower_tensors("text", 2)]
        )


def test_the_operator_tables_say_what_tensorrt_8_lacks():
    assert {"LayerNormalization", "Gelu", "CastLike", "Mish"} <= parsed_operators("B") - parsed_operators("A")


def _masked_attention(axis: int, *, given: bool = False) -> onnx.ModelProto:
    """Attention of opset 11, whose number of dimensions only the shape that splits the heads tells."""
    nodes = [
        N("Shape", ["x"], ["length"], name="length"),
        N("Gather", ["length", "first"], ["rows"], name="rows"),
        N("Concat", ["rows", "rest"], ["split"], name="split", axis=0),
        N("Reshape", ["x", "split"], ["r"], name="reshape"),
        N("Transpose", ["r"], ["q"], name="queries", perm=[0, 2, 1, 3]),
        N("Transpose", ["r"], ["k"], name="keys", perm=[0, 2, 3, 1]),
        N("MatMul", ["q", "k"], ["l"], name="bmm1"),
        N("Div", ["l", "root"], ["s"], name="scale"),
        N("Softmax", ["s"], ["y" if given else "p"], name="softmax", axis=axis),
        *([] if given else [N("MatMul", ["p", "q"], ["y"], name="bmm2")]),
    ]
    weights = {
        "first": np.array([0], np.int64), "rest": np.array([4, 2, 4], np.int64), "root": np.float32(2),
    }  # fmt: skip
    return graph_model(nodes, weights, opset=11)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("axis", [-1, 3, 2])
def test_a_softmax_of_before_opset_13_is_one_operator_again_where_it_goes_over_one_axis(
    axis: int, given: bool
):
    model = _masked_attention(axis, given=given)
    made = raised(model, 19)
    assert ("Flatten" in {node.op_type for node in made.graph.node}) == (axis == 2)
    assert len(list(attentions(Graph(made)))) == (axis != 2 and not given)
    x = normal(2, 4, 8)
    np.testing.assert_allclose(answers(made, {"x": x})[0], answers(model, {"x": x})[0], atol=1e-6)


@pytest.mark.parametrize("lane", [lane_a, lane_b])
def test_weights_that_are_inputs_too_are_no_inputs_of_a_lane(lane: Any) -> None:
    model = graph_model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(8, 8)}, opset=13)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 8]))
    lowered = lane(model).model
    assert [value.name for value in lowered.graph.input] == ["x"]


@pytest.mark.parametrize("lane", [lane_a, lane_b])
def test_what_onnxruntime_computes_under_onnx_s_own_name_is_named(lane: Any) -> None:
    node = helper.make_node("SimplifiedLayerNormalization", ["x", "w"], ["y"], "norm")
    model = graph_model([helper.make_node("Relu", ["x"], ["y"])], {"w": normal(8)}, opset=17)
    model.graph.node[0].CopyFrom(node)
    with pytest.raises(UserError, match=r"'norm' is a onnxruntime\.Simplified"):
        lane(model)


@pytest.mark.parametrize("lane", ["A", "B"])
@pytest.mark.parametrize("kind", ["INT16", "UINT64", "STRING"])
def test_a_tensor_of_a_type_that_tensorrt_lacks_is_named(lane: Lane, kind: str, tmp_path: Path):
    through = [
        helper.make_node("Cast", ["x"], ["between"], to=TensorProto.DataType.Value(kind)),
        helper.make_node("Cast", ["between"], ["y"], to=TensorProto.FLOAT),
    ]
    onnx.save(graph_model(through, {}, shape=("n", 4), opset=17), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=f"'between' is {kind}, and TensorRT has no such type"):
        lane_file(tmp_path / "m.onnx", tmp_path / "out.onnx", lane)
    assert not (tmp_path / "out.onnx").exists()
