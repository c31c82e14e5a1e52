"""FP16 graphs computed in FP32 again, and INT8 weights as floats behind Q/DQ: what lane A is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeglm.core.errors import UserError
from edgeglm.export.emit import types_of
from edgeglm.export.graph import (
    QUANTIZERS,
    Graph,
    all_nodes,
    attribute_of,
    drop_unused,
    inner_graphs,
    name_of,
    rename_readers,
    replace_nodes,
)

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def widen(model: onnx.ModelProto) -> int:
    """Make every FP16 and BF16 tensor of ``model`` FP32, in place; return how many weights were.

    Casts that then change nothing are taken out. Inputs and outputs change their types too.
    """
    count = _widen_graph(model.graph)
    for node in all_nodes(model.graph):
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in _NARROW:
                _widen_tensor(attribute.t)
    model.graph.ClearField("value_info")
    _drop_idle_casts(model)
    return count


def float_weights(model: onnx.ModelProto) -> int:
    """Turn INT8 weights into floats behind a Q/DQ pair, in place; return how many.

    TensorRT 8.5 takes no INT8 constants: it quantizes float ones itself where a QuantizeLinear stands, and
    finds the very same integers. INT32 biases become floats.

    Raises UserError for zero points and types that TensorRT 8.5 does not take.
    """
    graph = Graph(model)
    nodes: list[Any] = []
    count = 0
    for node in graph.nodes:
        if node.op_type in QUANTIZERS:
            _refuse_asymmetric(graph, node)
        if node.op_type != "DequantizeLinear" or node.input[0] not in graph.initializers:
            nodes.append(node)
            continue
        value = graph.constant(node.output[0])
        assert value is not None
        stored = graph.initializers[node.input[0]].data_type
        name = f"{node.input[0]}_float"
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        if stored == TensorProto.INT32:
            rename_readers(model.graph, {node.output[0]: name})
            continue
        if stored != TensorProto.INT8:
            kind = TensorProto.DataType.Name(stored)
            raise UserError(f"{name_of(node)} holds {kind} weights; quantize to INT8 for TensorRT 8.5")
        nodes += _pair(model, graph, node, name)
        count += 1
    replace_nodes(model.graph, nodes)
    drop_unused(model.graph)
    return count


def _pair(model: onnx.ModelProto, graph: Graph, node: onnx.NodeProto, weight: str) -> list[onnx.NodeProto]:
    scale = graph.constant(node.input[1])
    assert scale is not None
    zero = f"{weight}_zero"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(scale.shape, np.int8), zero))
    axis = {"axis": attribute_of(node, "axis", 1)} if scale.size > 1 else {}
    rounded = f"{weight}_rounded"
    base = name_of(node)
    return [
        helper.make_node(
            "QuantizeLinear", [weight, node.input[1], zero], [rounded], name=f"{base}/QuantizeLinear", **axis
        ),
        helper.make_node(
            "DequantizeLinear", [rounded, node.input[1], zero], list(node.output), name=base, **axis
        ),
    ]


def _refuse_asymmetric(graph: Graph, node: onnx.NodeProto) -> None:
    zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    remedy = "quantize symmetrically to INT8"
    if zero is not None and zero.dtype not in (np.int8, np.int32):
        raise UserError(f"{name_of(node)} quantizes to {zero.dtype}, which TensorRT does not take; {remedy}")
    if zero is not None and zero.any():
        raise UserError(f"{name_of(node)} has a zero point that is not 0, which TensorRT refuses; {remedy}")
    if zero is None and node.op_type == "QuantizeLinear":
        raise UserError(f"{name_of(node)} has no zero point and so quantizes to UINT8; {remedy}")


def _widen_graph(graph: onnx.GraphProto) -> int:
    narrow = [tensor for tensor in graph.initializer if tensor.data_type in _NARROW]
    for tensor in narrow:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    count = len(narrow)
    for node in graph.node:
        for inner in inner_graphs(node):
            inner.ClearField("value_info")
            count += _widen_graph(inner)
    return count


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _drop_idle_casts(model: onnx.ModelProto) -> None:
    types = types_of(model)
    outputs = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        if (
            node.op_type == "Cast"
            and types.get(node.input[0]) == attribute_of(node, "to")
            and node.output[0] not in outputs
        ):
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    replace_nodes(model.graph, kept)
    rename_readers(model.graph, renamed)
