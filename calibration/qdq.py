"""Q/DQ nodes as every runtime reads them alike.

ModelOpt's FP16 + INT8 graphs quantize FP16 values with FP16 scales. ONNX Runtime 1.24 on a CPU
truncates there where the specification rounds (0.7 / 0.5 gives 1, but 0.3 / 0.5 gives 0), which takes
a convolutional tower from a cosine of 0.99 to 0.27, so no figure measured on such a file is true.
Three changes make the file mean the same everywhere, and TensorRT reads it as strongly typed:

- weights are quantized here, once, and stored as INT8 behind a DequantizeLinear (half the bytes too);
- activations are cast to FP32 before QuantizeLinear; DequantizeLinear still yields FP16;
- only the nodes of the policy read dequantized values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

_INT8_MAX = 127


def settle_quantizers(model: onnx.ModelProto, readers: Collection[str] | None) -> tuple[int, int]:
    """Store weights as INT8 and quantize activations from FP32, in place.

    Args:
        model: What ModelOpt gave.
        readers: Names of the nodes that may read dequantized values; None for all. The others get
            the tensor as it was: ONNX Runtime's quantizer hands the rounded one to every consumer,
            so that residual Adds lose their precision although nobody asked for it.

    Returns:
        How many weights and how many activations the graph quantizes.
    """
    from onnx import numpy_helper

    graph = model.graph
    if readers is not None:
        _read_originals(graph, readers)
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    settled: dict[str, str] = {}  # output of a removed QuantizeLinear -> INT8 initializer
    weights = activations = 0
    for node in graph.node:
        if node.op_type != "QuantizeLinear":
            node.input[:] = [settled.get(name, name) for name in node.input]
            nodes.append(node)
            continue
        scale = numpy_helper.to_array(arrays[node.input[1]])
        if node.input[0] in arrays:
            values = quantized_weight(numpy_helper.to_array(arrays[node.input[0]]), scale, _axis(node))
            name = f"{node.input[0]}_int8"
            settled[node.output[0]] = name
            graph.initializer.append(numpy_helper.from_array(values, name))
            weights += 1
            continue
        activations += 1
        if scale.dtype == np.float16:
            nodes.extend(_cast_before(graph, node, scale))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    return weights, activations


def set_activation_ranges(model: onnx.ModelProto, ranges: Mapping[str, float]) -> None:
    """Give the quantizers of these activations a scale of ``largest / 127``, in place.

    A quantizer is known by what it makes, ``<tensor>_QuantizeLinear_Output``: casts may stand before it.
    """
    from onnx import numpy_helper

    scales = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        made = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        largest = ranges.get(made.removesuffix("_QuantizeLinear_Output"))
        if largest is None or node.input[1] not in scales:
            continue
        kind = numpy_helper.to_array(scales[node.input[1]]).dtype
        value = np.array(max(largest, 1e-6) / _INT8_MAX, dtype=kind)
        scales[node.input[1]].CopyFrom(numpy_helper.from_array(value, node.input[1]))


def quantized_weight(weight: npt.NDArray[Any], scale: npt.NDArray[Any], axis: int) -> npt.NDArray[np.int8]:
    """Round ``weight / scale`` half to even, symmetric: int8 of the weight's shape.

    ``scale`` is one number, or one for each index along ``axis``. Channels too small for the scale's
    dtype become 0; -128 is not used, as TensorRT asks for symmetric weights.
    """
    wide = scale.astype(np.float64)
    if wide.size > 1:
        wide = wide.reshape([-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)])
    return np.clip(np.rint(weight.astype(np.float64) / wide), -_INT8_MAX, _INT8_MAX).astype(np.int8)


def _read_originals(graph: onnx.GraphProto, readers: Collection[str]) -> None:
    quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    originals = {
        node.output[0]: quantized[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized
    }
    for node in graph.node:
        if node.name not in readers and node.op_type != "DequantizeLinear":
            node.input[:] = [originals.get(name, name) for name in node.input]


def _cast_before(graph: onnx.GraphProto, node: onnx.NodeProto, scale: npt.NDArray[Any]) -> list[Any]:
    from onnx import TensorProto, helper, numpy_helper

    wide, wide_scale = f"{node.output[0]}_from_fp32", f"{node.output[0]}_scale_fp32"
    cast = helper.make_node("Cast", [node.input[0]], [wide], name=f"{node.name}/Cast", to=TensorProto.FLOAT)
    graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), wide_scale))
    node.input[0], node.input[1] = wide, wide_scale
    return [cast, node]


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in used:
            del graph.initializer[index]
