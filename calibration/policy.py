"""Which nodes of a graph become INT8, as data. A policy names kinds of nodes, a plan names nodes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

import msgspec

from edgeglm.core.errors import UserError, unknown_name

if TYPE_CHECKING:
    import onnx

CalibrationMethod = Literal["max", "entropy"]
_WEIGHT_INPUT = {"Conv": 1, "Gemm": 1, "MatMul": 1}


class Int8Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a graph is quantized.

    Attributes:
        name: What reports call it.
        op_types: Ops with constant weights that are quantized. Residual Adds, the matrix products
            inside attention and embeddings have none, so they keep their precision: a residual
            stream with outliers is what breaks INT8 transformers.
        placement: "weights" quantizes the inputs of those ops; "modelopt" leaves the choice to
            ModelOpt's own rules, which also take Adds and attention.
        max_contraction: Leave out matrix products whose input is more than this many times wider
            than their output: the second layer of a feed-forward block, whose input (after GELU)
            has the long tail. None quantizes them too.
        exclude: Regular expressions; nodes whose whole name matches stay in high precision.
        per_channel_matmul: One scale for each output column of a MatMul's weight; ModelOpt alone
            gives one for each Conv channel, but only one for a whole MatMul weight.
        method: Activation ranges from the largest value, or those of least entropy loss.
    """

    name: str
    op_types: tuple[str, ...] = ("Conv", "Gemm", "MatMul")
    placement: Literal["weights", "modelopt"] = "weights"
    max_contraction: float | None = None
    exclude: tuple[str, ...] = ()
    per_channel_matmul: bool = True
    method: CalibrationMethod = "max"


_SHIPPED = (
    Int8Policy(name="linear-and-conv"),
    Int8Policy(name="linear-and-conv-entropy", method="entropy"),
    Int8Policy(name="expanding", max_contraction=1.0),
    Int8Policy(name="expanding-entropy", max_contraction=1.0, method="entropy"),
    Int8Policy(name="conv-only", op_types=("Conv",)),
    Int8Policy(name="linear-only", op_types=("Gemm", "MatMul")),
    Int8Policy(name="default", placement="modelopt", per_channel_matmul=False, method="entropy"),
)
POLICIES = {policy.name: policy for policy in _SHIPPED}


def policy_named(name: str) -> Int8Policy:
    """Return a shipped policy. Raises UserError that lists the known ones."""
    if name not in POLICIES:
        raise unknown_name("INT8 policy", name, POLICIES)
    return POLICIES[name]


def nodes_of_policy(model: onnx.ModelProto, policy: Int8Policy) -> list[str]:
    """Return the names of the nodes that ``policy`` quantizes, in graph order.

    Raises UserError when there is none, an op type cannot be quantized, or the model is quantized.
    """
    from edgeglm.export.graph import unquantized

    for op_type in policy.op_types:
        if op_type not in _WEIGHT_INPUT:
            raise unknown_name("quantizable op type", op_type, _WEIGHT_INPUT)
    unquantized(model)
    shapes = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
    patterns = [re.compile(pattern) for pattern in policy.exclude]
    names = [
        node.name
        for node in model.graph.node
        if node.op_type in policy.op_types
        and (shape := shapes.get(node.input[_WEIGHT_INPUT[node.op_type]])) is not None
        and not _contracts(node, shape, policy.max_contraction)
        and not any(pattern.fullmatch(node.name) for pattern in patterns)
    ]
    if not names:
        raise UserError(
            f"policy {policy.name!r} finds no node to quantize among {', '.join(policy.op_types)}; "
            "choose another policy"
        )
    return names


def _contracts(node: onnx.NodeProto, shape: tuple[int, ...], limit: float | None) -> bool:
    if limit is None or node.op_type == "Conv" or len(shape) != 2:
        return False
    transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
    inputs, outputs = reversed(shape) if transposed else shape
    return inputs > limit * outputs
