"""Attention's scale before its first product, where TensorRT asks for it.

``softmax(scale * Q K^T)`` becomes ``softmax((scale * Q) K^T)``: the factor goes into the weights and the bias
that make the queries, or is multiplied with the queries where those serve others too (NVIDIA TensorRT
documentation, "Fused Attention").
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgeglm.export.attention import attentions
from edgeglm.export.emit import types_of
from edgeglm.export.graph import Graph, name_of, rename_readers, replace_nodes
from edgeglm.export.patterns import Match
from edgeglm.export.rewritten import Rewritten


def fold_scales(model: onnx.ModelProto, done: Rewritten) -> None:
    """Move attention's scale from behind the first product into the weights of the queries."""
    found = [name_of(m.parts["scale"]) for m in attentions(Graph(model)) if "scale" in m.parts]
    for name in dict.fromkeys(found):  # two softmaxes may share one
        graph = Graph(model)  # made anew: the nodes are others after each change
        match = next(m for m in attentions(graph) if name_of(m.parts.get("scale", m.nodes[0])) == name)
        scale, query = match.parts["scale"], match.parts.get("query")
        factor = factor_of(graph, scale)
        if (why := why_scale_stays(graph, match)) or factor is None:
            done.kept[name] = why
            continue
        weight = graph.initializers.get(query.input[1]) if query is not None else None
        bias = None if query is None else _bias_behind(graph, query)
        if query is None or weight is None or bias is None or not _alone(graph, match, bias[0]):
            _scale_before(model, match, factor, name)
        else:
            _scaled_constant(model, query, 1, factor)
            _scaled_constant(model, bias[0], bias[1], factor)
        kept = [node for node in model.graph.node if node.output[:1] != scale.output[:1]]
        replace_nodes(model.graph, kept)
        rename_readers(model.graph, {scale.output[0]: _computed(graph, scale)})
        done.made.setdefault("attention-scale", []).append(name)


def why_scale_stays(graph: Graph, match: Match) -> str:
    """Say what would answer otherwise, or lose INT8, if the scale went before its product; "" for nothing."""
    scale, bmm1 = match.parts["scale"], match.parts["bmm1"]
    if factor_of(graph, scale) is None:
        return "its factor is computed, or divided by the product"
    between, name = match.nodes[1], _computed(graph, scale)
    if between.output[0] != scale.output[0]:
        return f"it scales what {name_of(between)} makes of the product"
    if graph.quantizers_before(name) or graph.is_quantized(bmm1.input[0]):
        return "the product is quantized; move it before quantizing"
    readers = graph.true_readers(bmm1.output[0])
    if len(readers) > 1:
        return f"{' and '.join(name_of(node) for node in readers)} read the product"
    while name != bmm1.output[0] and name not in graph.outputs:
        name = graph.made_by[name].input[0]  # a Cast
    if name in graph.outputs or scale.output[0] in graph.outputs:
        return "its product, or what it makes of it, is an output of the graph"
    return ""


def _computed(graph: Graph, scale: onnx.NodeProto) -> str:
    computed: str = next(side for side in scale.input if graph.scalar(side) is None)
    return computed


def _alone(graph: Graph, match: Match, bias: onnx.NodeProto) -> bool:
    """Say whether a projection and its bias make nothing but queries, and nothing is added besides.

    One product may make queries, keys and values.
    """
    name, projection = match.tensors["query"], match.parts["query"]
    for _ in range(12):
        node = graph.made_by.get(name)
        if node is None or len(graph.readers.get(name, ())) != 1 or name in graph.outputs:
            return False
        if node.op_type in ("Slice", "Split", "Gather"):
            return False
        if node.op_type == "Add" and node.output[0] != bias.output[0]:
            return False
        if node.output[0] == projection.output[0]:
            return True
        name = next((side for side in node.input if not graph.is_constant(side)), "")
    return False


def factor_of(graph: Graph, scale: onnx.NodeProto) -> float | None:
    """Return what a Mul or Div multiplies the product by; None where that is computed, or divided by it."""
    if scale.op_type == "Mul":
        found = [value for side in scale.input if (value := graph.scalar(side)) is not None]
        return found[0] if found else None
    value = graph.scalar(scale.input[1])
    return 1.0 / value if value else None


def _bias_behind(graph: Graph, query: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
    """Return the node and the index of its input that is the bias of a projection, if it has one."""
    if query.op_type != "MatMul":
        return None
    readers = graph.true_readers(query.output[0])
    if len(readers) == 1 and readers[0].op_type == "Add":
        for index, side in enumerate(readers[0].input):
            if side in graph.initializers:
                return readers[0], index
    return None


def _scaled_constant(model: onnx.ModelProto, node: onnx.NodeProto, index: int, factor: float) -> None:
    name = node.input[index]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value: npt.NDArray[np.float64] = numpy_helper.to_array(tensor).astype(np.float64) * factor
    scaled = f"{name}_scaled_{name_of(node)}"
    kind = numpy_helper.to_array(tensor).dtype
    model.graph.initializer.append(numpy_helper.from_array(value.astype(kind), scaled))
    node.input[index] = scaled


def _scale_before(model: onnx.ModelProto, match: Match, factor: float, name: str) -> None:
    """Multiply the queries themselves, where their weights cannot take the factor."""
    bmm1 = match.parts["bmm1"]
    constant, scaled = f"{name}/factor", f"{name}/scaled_query"
    kind = helper.tensor_dtype_to_np_dtype(types_of(model).get(bmm1.input[0], onnx.TensorProto.FLOAT))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(factor, kind), constant))
    node = helper.make_node("Mul", [bmm1.input[0], constant], [scaled], name=f"{name}/before")
    nodes = []
    for old in model.graph.node:
        if old.output[:1] == bmm1.output[:1]:
            nodes.append(node)
            old.input[0] = scaled
        nodes.append(old)
    replace_nodes(model.graph, nodes)
