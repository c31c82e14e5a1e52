"""GELU in every form that exporters write: the operator, by Erf, by Tanh, and by a sigmoid as CLIP has it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgeglm.export.graph import Graph
from edgeglm.export.patterns import Match, constant_sides, only_reader, quantizers_inside

_QUICK_FACTOR = 1.702
_ARITHMETIC = {"Add": np.add, "Mul": np.multiply, "Div": np.divide, "Pow": np.power}
_POINTS = np.array([-2.0, -0.5, 0.25, 1.0, 3.0])
#: What the curves of GELU are taken of at these points.
_ERF = _POINTS / math.sqrt(2)
_TANH = math.sqrt(2 / math.pi) * (_POINTS + 0.044715 * _POINTS**3)


def gelus(graph: Graph) -> Iterator[Match]:
    """Find GELU: the operator, through Erf or Tanh, or x * sigmoid(1.702 x).

    Part: "curve". Tensor: "approximate", which for the last is "sigmoid", a form that the operator lacks.
    """
    for node in graph.nodes:
        if node.op_type == "Gelu":
            yield Match(kind="gelu", nodes=(node,), input=node.input[0], output=node.output[0])
        elif node.op_type in ("Erf", "Tanh"):
            match = _gelu_around(graph, node)
            if match is not None:
                yield match
        elif node.op_type == "Sigmoid":
            match = _quick_gelu(graph, node)
            if match is not None:
                yield match


def _quick_gelu(graph: Graph, curve: onnx.NodeProto) -> Match | None:
    """Match x * sigmoid(1.702 x), in either order of the factors."""
    inner, product = graph.maker(curve.input[0]), only_reader(graph, curve.output[0], "Mul")
    if inner is None or inner.op_type != "Mul" or product is None:
        return None
    roots = [
        other
        for value, other in constant_sides(graph, inner)
        if value is not None and math.isclose(value, _QUICK_FACTOR, rel_tol=1e-3)
    ]
    sides = {graph.source(name) for name in product.input}
    if not roots or sides != {graph.source(roots[0]), graph.source(curve.output[0])}:
        return None
    nodes = [inner, curve, product]
    return Match(
        kind="gelu",
        nodes=tuple(nodes),
        input=roots[0],
        output=product.output[0],
        parts={"curve": curve},
        tensors={"approximate": "sigmoid"},
        quantizers=quantizers_inside(graph, nodes, roots[0]),
    )


def _gelu_around(graph: Graph, curve: onnx.NodeProto) -> Match | None:
    """Match x * 0.5 * (1 + curve(...)) in any order of the factors."""
    added = only_reader(graph, curve.output[0], "Add")
    if added is None or not any(value == 1.0 for value, _ in constant_sides(graph, added)):
        return None
    inner = _upward(graph, curve.input[0], tuple(_ARITHMETIC))
    factors, tail = [added], added
    half = False
    roots: list[str] = []
    while (product := only_reader(graph, tail.output[0], "Mul")) is not None and len(factors) < 4:
        sides = [name for name in product.input if graph.source(name) != graph.source(tail.output[0])]
        if len(sides) != 1:
            break
        value = graph.scalar(sides[0])
        if value is None and roots:
            break
        if value is not None and (half or not math.isclose(value, 0.5, rel_tol=1e-3)):
            break
        half = half or value is not None
        if value is None:
            roots.append(sides[0])
        factors.append(product)
        tail = product
    if not roots:
        return None
    root, maker = roots[0], graph.maker(roots[0])
    if not half and maker is not None and maker.op_type == "Mul":
        halves = [other for value, other in constant_sides(graph, maker) if value == 0.5]
        if halves:
            root, half = halves[0], True
            factors.insert(0, maker)
    exact = curve.op_type == "Erf"
    argument = _computed(graph, curve.input[0], graph.source(root))
    if not half or argument is None or not np.allclose(argument, _ERF if exact else _TANH, rtol=1e-2):
        return None
    nodes = [*inner, curve, *factors]
    return Match(
        kind="gelu",
        nodes=tuple({node.output[0]: node for node in nodes}.values()),
        input=root,
        output=tail.output[0],
        parts={"curve": curve},
        tensors={"approximate": "none" if exact else "tanh"},
        quantizers=quantizers_inside(graph, nodes, root),
    )


def _upward(graph: Graph, name: str, ops: tuple[str, ...], limit: int = 6) -> list[onnx.NodeProto]:
    node = graph.maker(name)
    if node is None or node.op_type not in ops or limit == 0:
        return []
    above = [found for side in node.input for found in _upward(graph, side, ops, limit - 1)]
    return [*above, node]


def _computed(graph: Graph, name: str, root: str, limit: int = 8) -> npt.NDArray[Any] | None:
    """Compute a tensor where ``root`` is ``_POINTS``; None if it is made of anything but that and numbers."""
    if graph.source(name) == root:
        return _POINTS
    if (value := graph.scalar(name)) is not None:
        return np.array(value)
    node = graph.maker(name)
    if node is None or node.op_type not in _ARITHMETIC or limit == 0:
        return None
    sides = [_computed(graph, side, root, limit - 1) for side in node.input]
    one, other = sides
    if one is None or other is None:
        return None
    made: npt.NDArray[Any] = _ARITHMETIC[node.op_type](one, other)
    return made
