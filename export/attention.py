"""Attention in a graph: softmax(scale * Q K^T + mask) V, with what stands between its products."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from edgeglm.export.graph import Graph
from edgeglm.export.patterns import Match

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand")
_BEFORE_SOFTMAX = ("Add", "Mul", "Div", "Where", "Clip", "Max", "Sub")
_AFTER_SOFTMAX = ("Dropout", "Where", "Mul")


def attentions(graph: Graph) -> Iterator[Match]:
    """Find each softmax between two products of computed matrices, and each Attention operator.

    Parts: "bmm1", "softmax", "bmm2", and where they are there "scale" (a factor after the first product),
    "mask", "query_scale", "key_scale" (factors before it), "query", "key", "value" (the projections).
    """
    for node in graph.nodes:
        if node.op_type in ("Attention", "MultiHeadAttention"):
            yield Match(kind="attention", nodes=(node,), input=node.input[0], output=node.output[0])
        elif node.op_type == "Softmax":
            match = _around(graph, node)
            if match is not None:
                yield match


def _around(graph: Graph, softmax: onnx.NodeProto) -> Match | None:
    parts: dict[str, onnx.NodeProto] = {"softmax": softmax}
    between: list[onnx.NodeProto] = []
    name = softmax.input[0]
    while (node := graph.maker(name)) is not None and node.op_type in _BEFORE_SOFTMAX:
        scalars = [side for side in node.input if graph.scalar(side) is not None]
        if node.op_type in ("Mul", "Div") and scalars:
            parts["scale"] = node
        elif node.op_type in ("Add", "Where"):
            parts["mask"] = node
        between.insert(0, node)
        computed = [side for side in node.input if _leads_to_product(graph, side)]
        if not computed:
            return None
        name = computed[0]
    bmm1 = node
    if bmm1 is None or bmm1.op_type != "MatMul" or any(graph.is_constant(side) for side in bmm1.input):
        return None
    after, tail = [], softmax
    while True:
        readers = _without_guard(graph.true_readers(tail.output[0]))
        if len(readers) != 1:
            return None
        if readers[0].op_type == "MatMul":
            bmm2 = readers[0]
            break
        if readers[0].op_type not in _AFTER_SOFTMAX:
            return None
        tail = readers[0]
        after.append(tail)
    if graph.source(bmm2.input[0]) != graph.source(tail.output[0]):
        return None
    parts |= {"bmm1": bmm1, "bmm2": bmm2}
    for role, side in (("query", bmm1.input[0]), ("key", bmm1.input[1]), ("value", bmm2.input[1])):
        projection, scale = projection_of(graph, side)
        if projection is not None:
            parts[role] = projection
        if scale is not None:
            parts[f"{role}_scale"] = scale
    return Match(
        kind="attention",
        nodes=(bmm1, *between, softmax, *after, bmm2),
        input=bmm1.input[0],
        output=bmm2.output[0],
        parts=parts,
        tensors={"query": bmm1.input[0], "key": bmm1.input[1], "value": bmm2.input[1]},
    )


def _without_guard(readers: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Leave out the IsNaN of a Where that gives rows which a mask hides whole, as torch writes them."""
    asked = {node.output[0]: node for node in readers if node.op_type == "IsNaN"}
    guarded = {node.input[0] for node in readers if node.op_type == "Where"} & set(asked)
    return [node for node in readers if node.output[0] not in guarded]


def projection_of(graph: Graph, name: str) -> tuple[onnx.NodeProto | None, onnx.NodeProto | None]:
    """Return the product with constant weights that made a tensor, and a scalar factor on the way."""
    scale = None
    for _ in range(12):
        node = graph.maker(name)
        if node is None:
            return None, scale
        if node.op_type in ("MatMul", "Gemm"):
            return (node, scale) if graph.is_constant(node.input[1]) else (None, scale)
        computed = [side for side in node.input if side and not graph.is_constant(side)]
        if node.op_type in ("Mul", "Div") and any(graph.scalar(side) is not None for side in node.input):
            scale = node
        elif node.op_type not in (*_LAYOUT, "Add"):
            return None, scale
        if not computed or (node.op_type == "Add" and len(computed) != 1):
            return None, scale
        name = computed[0]
    return None, scale


def _leads_to_product(graph: Graph, name: str) -> bool:
    """Say whether a tensor is the first product, or a step from it to the softmax."""
    for _ in range(6):
        node = graph.maker(name)
        if node is None:
            return False
        if node.op_type == "MatMul":
            return not any(graph.is_constant(side) for side in node.input)
        if node.op_type not in _BEFORE_SOFTMAX:
            return False
        computed = [side for side in node.input if _makes_product(graph, side)]
        if not computed:
            return False
        name = computed[0]
    return False


def _makes_product(graph: Graph, name: str) -> bool:
    node = graph.maker(name)
    return node is not None and node.op_type in ("MatMul", *_BEFORE_SOFTMAX)
