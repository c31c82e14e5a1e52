"""If these fail, moving attention's scale before its product makes a model into another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeglm.export.attention_scale import fold_scales
from edgeglm.export.fusion import fusion_report
from edgeglm.export.graph import drop_unused, sorted_nodes
from edgeglm.export.rewritten import Rewritten
from scripts.fixtures.graphs import answers, graph_model, normal

N = helper.make_node
X = normal(2, 4, 8, seed=9)
ROLES = ("query", "key", "value")
SCALED = (N("Mul", ["l", "factor"], ["s"], name="scale"), N("Softmax", ["s"], ["p"], name="softmax"))


def attention(
    between: Sequence[onnx.NodeProto] = SCALED,
    *,
    queries: Sequence[onnx.NodeProto] = (N("Identity", ["a"], ["q"], name="queries"),),
    others: Sequence[onnx.NodeProto] = (),
    outputs: Sequence[str] = ("y",),
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """One head; ``queries`` stand behind their projection, ``between`` between the first product and "p"."""
    nodes = [
        N("MatMul", ["x", "query.w"], ["m"], name="query"),
        N("Add", ["m", "query.b"], ["a"], name="bias"),
        *queries,
        N("MatMul", ["x", "key.w"], ["k"], name="key"),
        N("Transpose", ["k"], ["t"], name="transpose", perm=[0, 2, 1]),
        N("MatMul", ["x", "value.w"], ["v"], name="value"),
        N("MatMul", ["q", "t"], ["l"], name="bmm1"),
        *between,
        N("MatMul", ["p", "v"], ["y"], name="bmm2"),
        *others,
    ]
    values: dict[str, Any] = {f"{role}.w": normal(8, 8, seed=i) for i, role in enumerate(ROLES)}
    values |= {"query.b": normal(8, seed=4), "more": normal(8, seed=5), "factor": np.float32(0.25)}
    values |= {"mask": np.array([0, -3, 1, 2], np.float32), "low": np.float32(-0.5)}
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weights: dict[str, Any] = {name: np.asarray(value, kind) for name, value in values.items()}
    weights |= {"step": np.float32(0.05), "zero": np.int8(0)}
    model = graph_model(nodes, weights, outputs=outputs, dtype=dtype, out_dtype=dtype)
    drop_unused(model.graph)
    return model


def folded(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Rewritten]:
    made, done = onnx.ModelProto(), Rewritten()
    made.CopyFrom(model)
    fold_scales(made, done)
    drop_unused(made.graph)
    sorted_nodes(made.graph)
    onnx.checker.check_model(made, full_check=True)
    return made, done


def assert_same_answers(one: onnx.ModelProto, other: onnx.ModelProto, *, atol: float = 1e-6) -> None:
    kind = helper.tensor_dtype_to_np_dtype(one.graph.input[0].type.tensor_type.elem_type)
    feeds = {"x": X.astype(kind)}
    for mine, theirs in zip(answers(one, feeds), answers(other, feeds), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=atol)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"between": (N("Add", ["l", "mask"], ["b"], name="mask"),
                         N("Mul", ["b", "factor"], ["s"], name="scale"), SCALED[1])},
            "it scales what mask makes of the product",
        ),
        (
            {"between": (N("Clip", ["l", "low"], ["c"], name="clip"),
                         N("Mul", ["c", "factor"], ["s"], name="scale"), SCALED[1])},
            "it scales what clip makes of the product",
        ),
        ({"others": (N("Relu", ["l"], ["z"], name="other"),), "outputs": ("y", "z")}, "scale and other read"),
        ({"outputs": ("y", "l")}, "is an output of the graph"),
        ({"outputs": ("y", "s")}, "is an output of the graph"),
        (
            {"queries": (N("QuantizeLinear", ["a", "step", "zero"], ["i"], name="quantize"),
                         N("DequantizeLinear", ["i", "step", "zero"], ["q"], name="dequantize"))},
            "the product is quantized; move it before quantizing",
        ),
    ],
)  # fmt: skip
def test_a_scale_stays_where_others_see_its_product_and_the_report_says_why(
    changes: dict[str, Any], why: str
):
    model = attention(**changes)
    made, done = folded(model)
    assert done.made == {}
    assert why in done.kept["scale"]
    assert_same_answers(made, model)
    (row,) = (row for row in fusion_report(model).missed("tensorrt") if row.pattern == "attention")
    assert (row.blocker, row.why.endswith(done.kept["scale"])) == ("scale", True)


@pytest.mark.parametrize(
    "changes",
    [
        {"queries": (N("Add", ["a", "more"], ["q"], name="another"),)},
        {
            "between": (
                SCALED[0],
                N("Softmax", ["s"], ["p1"], name="softmax"),
                N("Add", ["s", "mask"], ["b"], name="mask"),
                N("Softmax", ["b"], ["p2"], name="masked/softmax"),
                N("MatMul", ["p1", "v"], ["o1"], name="one"),
                N("MatMul", ["p2", "v"], ["o2"], name="other"),
                N("Add", ["o1", "o2"], ["o"], name="sum"),
                N("MatMul", ["o", "t"], ["p"], name="again"),
            )
        },
    ],
    ids=["a second sum behind the bias", "two softmaxes of one scale"],
)
def test_a_scale_that_goes_before_its_product_reaches_all_of_the_queries(changes: dict[str, Any]):
    model = attention(**changes)
    made, done = folded(model)
    assert done.made == {"attention-scale": ["scale"]}
    assert_same_answers(made, model)


def test_a_factor_before_fp16_queries_is_fp16_whatever_holds_it():
    held = N("Constant", [], ["half"], value=onnx.numpy_helper.from_array(np.array(0.25, np.float16)))
    model = attention(
        (held, N("Mul", ["l", "half"], ["s"], name="scale"), SCALED[1]),
        queries=(N("Relu", ["a"], ["q"], name="queries"),),
        dtype=TensorProto.FLOAT16,
    )
    made, done = folded(model)
    assert done.made == {"attention-scale": ["scale"]}
    assert_same_answers(made, model, atol=1e-2)
