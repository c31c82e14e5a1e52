"""One product in the place of three that read the same tensor: queries, keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgeglm.export.graph import Graph, name_of
from edgeglm.export.patterns import Match

Merged = tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[str]]


def merged_projection(graph: Graph, match: Match) -> Merged | str:
    """Return the nodes in the place of an attention's projections, or why there are none.

    Returns:
        New nodes, new weights, and the first outputs of the nodes that they replace, the first of them
        being where the new ones go; or a sentence.
    """
    if any(role not in match.parts for role in ("query", "key", "value")):
        return "its projections are no products with constant weights"
    products = [match.parts[role] for role in ("query", "key", "value")]
    if len({name_of(node) for node in products}) != 3:
        return "it has one product already"
    if len({node.input[0] for node in products}) != 1 or any(node.op_type != "MatMul" for node in products):
        return "its projections read several tensors"
    weights = [graph.initializers.get(node.input[1]) for node in products]
    if any(weight is None or len(weight.dims) != 2 for weight in weights):
        return "the weights of its projections are quantized or shared"
    arrays = [numpy_helper.to_array(weight) for weight in weights if weight is not None]
    biases = [_bias(graph, node) for node in products]
    name = f"{name_of(match.parts['softmax'])}/qkv"
    weight = f"{name}/weight"
    tensors = [numpy_helper.from_array(np.concatenate(arrays, axis=1), weight)]
    nodes = [
        helper.make_node("MatMul", [products[0].input[0], weight], [f"{name}/product"], name=f"{name}/MatMul")
    ]
    ends, gone, last = (
        [node.output[0] for node in products],
        [n.output[0] for n in products],
        f"{name}/product",
    )
    found = [bias for bias in biases if bias is not None]
    if len(found) == 3:
        bias = f"{name}/bias"
        tensors.append(numpy_helper.from_array(np.concatenate([value for _, value in found]), bias))
        last = f"{name}/sum"
        nodes.append(helper.make_node("Add", [f"{name}/product", bias], [last], name=f"{name}/Add"))
        ends = [node.output[0] for node, _ in found]
        gone += ends
    elif found:
        return "only some of its projections have a bias"
    sizes = f"{name}/sizes"
    tensors.append(numpy_helper.from_array(np.array([a.shape[1] for a in arrays], np.int64), sizes))
    nodes.append(helper.make_node("Split", [last, sizes], ends, name=f"{name}/Split", axis=-1))
    return nodes, tensors, gone


def _bias(graph: Graph, product: onnx.NodeProto) -> tuple[onnx.NodeProto, npt.NDArray[Any]] | None:
    readers = graph.readers.get(product.output[0], [])
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    for side in readers[0].input:
        tensor = graph.initializers.get(side)
        if tensor is not None and len(tensor.dims) == 1:
            return readers[0], numpy_helper.to_array(tensor)
    return None
