"""Softmax of models before opset 13, which went over all dimensions from its axis on, as one operator again.

``onnx.version_converter`` writes Flatten, Softmax and Reshape, also where the axis is the last and nothing
changed. Runtimes then see no attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from edgeglm.export.emit import shapes_of
from edgeglm.export.graph import Graph, attribute_of, drop_unused, replace_nodes

_OPS = ("Softmax", "LogSoftmax", "Hardmax")
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "MatMul")

Shapes = Mapping[str, Sequence[int | None]]


def join_softmaxes(model: onnx.ModelProto) -> None:
    """Take out, in place, the Flatten and Reshape around each softmax over the last dimension alone."""
    graph, shapes = Graph(model), shapes_of(model)
    gone: set[str] = set()
    for node in graph.nodes:
        flatten = graph.made_by.get(node.input[0]) if node.op_type in _OPS else None
        readers = graph.readers.get(node.output[0], [])
        if flatten is None or flatten.op_type != "Flatten" or [r.op_type for r in readers] != ["Reshape"]:
            continue
        source, shape = flatten.input[0], graph.made_by.get(readers[0].input[1])
        restored = shape is not None and shape.op_type == "Shape" and shape.input[0] == source
        rank = _rank(graph, shapes, source)
        if restored and rank is not None and attribute_of(flatten, "axis", 1) in (rank - 1, -1):
            gone.add(readers[0].output[0])
            node.input[0], node.output[0] = source, readers[0].output[0]
    replace_nodes(model.graph, [n for n in graph.nodes if n.op_type != "Reshape" or n.output[0] not in gone])
    drop_unused(model.graph)


def _rank(graph: Graph, shapes: Shapes, name: str, steps: int = 8) -> int | None:
    """Return the number of dimensions of a tensor, None if unknown: a computed shape still has a length."""
    node = graph.made_by.get(name)
    if name in shapes or node is None or not steps:
        return len(shapes[name]) if name in shapes else None
    if node.op_type == "Reshape":
        length = shapes.get(node.input[1])
        return length[0] if length else None
    if node.op_type == "Transpose":
        return len(attribute_of(node, "perm", ())) or None
    if node.op_type not in _BROADCAST:
        return None
    ranks = [_rank(graph, shapes, side, steps - 1) for side in node.input]
    return None if None in ranks else max(rank for rank in ranks if rank is not None)
