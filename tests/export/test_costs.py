from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.export.costs import costs_from_onnx, costs_sources  # noqa: E402
from edgeglm.targets.costs import NodeCost, costs_from_json  # noqa: E402


def saved(
    path: Path, nodes: Sequence[Any], weights: dict[str, Any], *, shape: Sequence[int | str], out: int,
    dtype: int = TensorProto.FLOAT,
) -> Path:  # fmt: skip
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", dtype, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", *[None] * (out - 1)])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def only(nodes: Sequence[NodeCost], name: str) -> NodeCost:
    return next(node for node in nodes if node.name == name)


def test_a_product_costs_two_operations_an_inner_element(tmp_path: Path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    weights = {"w": np.zeros((16, 8), np.float32)}
    costs = costs_from_onnx(saved(tmp_path / "m.onnx", [node], weights, shape=["B", 4, 16], out=3))
    m = only(costs.nodes, "m")
    assert (m.kind, m.precision) == ("matrix", "fp32")
    assert (m.flops, m.flops_fixed) == (2 * 4 * 8 * 16, 0)
    assert m.weight_bytes == costs.weight_bytes == 16 * 8 * 4
    assert m.bytes == costs.io_bytes == (4 * 16 + 4 * 8) * 4
    assert costs.inputs[0].shape == ("B", 4, 16)
    assert (costs.unknown, costs.quantized, costs.opset) == (0, False, 20)


def test_a_grouped_convolution_costs_its_group_only(tmp_path: Path):
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="c", group=8, kernel_shape=[3, 3], pads=[1] * 4)
    weights = {"w": np.zeros((8, 1, 3, 3), np.float32)}
    path = saved(tmp_path / "c.onnx", [node], weights, shape=["B", 8, 10, 10], out=4)
    assert only(costs_from_onnx(path).nodes, "c").flops == 2 * 8 * 10 * 10 * 9


def test_q_dq_makes_a_product_int8_and_its_weights_a_quarter(tmp_path: Path):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"], name="dq"),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="m"),
    ]
    weights = {
        "s": np.array(0.1, np.float32),
        "z": np.array(0, np.int8),
        "wq": np.zeros((16, 8), np.int8),
    }
    costs = costs_from_onnx(saved(tmp_path / "q.onnx", nodes, weights, shape=["B", 16], out=2))
    m = only(costs.nodes, "m")
    assert (m.precision, m.weight_bytes, costs.quantized) == ("int8", 16 * 8, True)
    assert only(costs.nodes, "dq").bytes == 0, "a constant is folded and moves nothing"


def test_an_embedding_table_costs_its_rows_and_not_itself(tmp_path: Path):
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["rows"], name="embed"),
        helper.make_node("ReduceMean", ["rows", "one"], ["y"], name="pool", keepdims=0),
    ]
    weights = {"table": np.zeros((30000, 64), np.float32), "one": np.array([1], np.int64)}
    path = saved(tmp_path / "e.onnx", nodes, weights, shape=["B", "L"], out=2, dtype=TensorProto.INT64)
    costs = costs_from_onnx(path, length=8)
    assert costs.weight_bytes == 8, "the axes; the table is not read whole"
    assert only(costs.nodes, "embed").bytes == 2 * 8 * 64 * 4
    assert costs.file_bytes > 30000 * 64 * 4


def test_shapes_that_depend_on_data_are_seen_by_running(tmp_path: Path):
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"], name="nz"),
        helper.make_node("Cast", ["where"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], name="t"),
        helper.make_node("MatMul", ["t", "w"], ["y"], name="m"),
    ]
    costs = costs_from_onnx(
        saved(tmp_path / "d.onnx", nodes, {"w": np.zeros((2, 8), np.float32)}, shape=["B", 4], out=2)
    )
    assert costs.unknown == 0
    assert only(costs.nodes, "m").flops == 2 * 4 * 8 * 2, "on ones, no element is zero"


def test_a_node_that_cannot_run_counts_as_nothing_and_is_told(tmp_path: Path):
    nodes = [
        helper.make_node("Magic", ["x"], ["v"], name="magic", domain="my.own"),
        helper.make_node("Relu", ["v"], ["y"], name="relu"),
    ]
    costs = costs_from_onnx(saved(tmp_path / "u.onnx", nodes, {}, shape=["B", 4], out=2))
    assert costs.unknown == 2
    assert costs.ops == {"Relu": 1, "my.own.Magic": 1}


def test_the_most_that_lives_at_once_forgets_what_is_done(tmp_path: Path):
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Relu", ["b"], ["y"])]  # fmt: skip
    costs = costs_from_onnx(saved(tmp_path / "l.onnx", nodes, {}, shape=["B", 100], out=2))
    assert costs.live(3) == 3 * 2 * 400


def test_what_is_packed_is_read_back_without_onnx(tmp_path: Path):
    node = helper.make_node("Relu", ["x"], ["y"])
    path = saved(tmp_path / "r.onnx", [node], {}, shape=["B", 4], out=2)
    files = costs_sources({"fp32": {"image": path}})
    assert list(files) == ["costs/fp32-image.json"]
    assert costs_from_json(files["costs/fp32-image.json"], "x") == costs_from_onnx(path)


@pytest.mark.parametrize("content", [None, b"", b"no onnx at all"])
def test_what_is_no_onnx_is_said(content: bytes | None, tmp_path: Path):
    path = tmp_path / "x.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.onnx"):
        costs_from_onnx(path)
