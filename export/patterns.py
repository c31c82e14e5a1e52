"""The patterns that runtimes fuse, found in a graph whatever it is written with, Q/DQ between or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from edgeglm.export.graph import Graph, attribute_of

Kind = Literal[
    "layer-norm", "rms-norm", "gelu", "attention", "conv-batch-norm",
    "embedding-layer-norm", "skip-layer-norm",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Match:
    """One place where a pattern stands.

    Attributes:
        kind: Of the pattern.
        nodes: What computes it, Q/DQ and casts left out; the last one writes ``output``.
        input, output: The tensors at its ends.
        parts: Its nodes by role; see the finder.
        tensors: Its other tensors by role, "" for an absent one.
        epsilon: Of a normalization.
        axes: That a normalization goes over.
        quantizers: Q/DQ nodes that stand inside, between two of its nodes.
    """

    kind: Kind
    nodes: tuple[onnx.NodeProto, ...]
    input: str
    output: str
    parts: dict[str, onnx.NodeProto] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    epsilon: float = 0.0
    axes: tuple[int, ...] = ()
    quantizers: tuple[onnx.NodeProto, ...] = ()

    @property
    def decomposed(self) -> bool:
        """Whether several operators compute it."""
        return len(self.nodes) > 1


def norms(graph: Graph) -> Iterator[Match]:
    """Find LayerNorm and RMSNorm, as one operator or step by step.

    Parts: "square" and "mean" of a decomposed one. Tensors: "scale" and "bias".
    """
    for node in graph.nodes:
        if node.op_type == "LayerNormalization":
            inputs = [*node.input, ""]
            yield Match(
                kind="layer-norm",
                nodes=(node,),
                input=node.input[0],
                output=node.output[0],
                tensors={"scale": inputs[1], "bias": inputs[2]},
                epsilon=attribute_of(node, "epsilon", 1e-5),
            )
        elif node.op_type == "RMSNormalization":
            yield Match(
                kind="rms-norm",
                nodes=(node,),
                input=node.input[0],
                output=node.output[0],
                tensors={"scale": node.input[1], "bias": ""},
                epsilon=attribute_of(node, "epsilon", 1e-5),
            )
        elif node.op_type in ("Div", "Mul"):
            match = _decomposed_norm(graph, node)
            if match is not None:
                yield match


def _decomposed_norm(graph: Graph, node: onnx.NodeProto) -> Match | None:
    """Match x / sqrt(mean(x^2) + epsilon), then look whether x was centred before."""
    for top, below in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        if node.op_type == "Div" and top != node.input[0]:
            continue
        chain = _root_mean_square(graph, below, inverse=node.op_type == "Mul")
        if chain is None:
            continue
        nodes, squared, epsilon, axes = chain
        if not _same(graph, squared, top):
            continue
        return _with_affine(graph, node, nodes, top, epsilon, axes)
    return None


def _with_affine(
    graph: Graph,
    last: onnx.NodeProto,
    nodes: list[onnx.NodeProto],
    top: str,
    epsilon: float,
    axes: tuple[int, ...],
) -> Match:
    nodes = [*nodes, last]
    square = next(node for node in nodes if node.op_type in ("Pow", "Mul", "ReduceSumSquare"))
    mean = next(node for node in nodes if node.op_type == "ReduceMean")
    kind: Kind = "rms-norm"
    start = top
    centre = graph.maker(top)
    if centre is not None and centre.op_type == "Sub":
        average = graph.maker(centre.input[1])
        if (
            average is not None
            and average.op_type == "ReduceMean"
            and graph.source(average.input[0]) == graph.source(centre.input[0])
            and _axes(graph, average) == axes
            and attribute_of(average, "keepdims", 1)
        ):
            other = graph.maker(square.input[0])  # some exporters subtract twice
            nodes = [average, centre, *([other] if other is not None and other is not centre else []), *nodes]
            kind, start = "layer-norm", centre.input[0]
    output, tensors = last.output[0], {"scale": "", "bias": ""}
    for op, role in (("Mul", "scale"), ("Add", "bias")):
        readers = graph.true_readers(output)
        if len(readers) != 1 or readers[0].op_type != op or output in graph.outputs:
            break
        others = [name for name in readers[0].input if graph.is_constant(name)]
        if len(others) != 1 or not _along(graph.constant(others[0]), len(axes)):
            break
        tensors[role] = others[0]
        output = readers[0].output[0]
        nodes.append(readers[0])
    return Match(
        kind=kind,
        nodes=tuple(nodes),
        input=start,
        output=output,
        parts={"square": square, "mean": mean},
        tensors=tensors,
        epsilon=epsilon,
        axes=axes,
        quantizers=quantizers_inside(graph, nodes, start),
    )


def _root_mean_square(
    graph: Graph, name: str, *, inverse: bool
) -> tuple[list[onnx.NodeProto], str, float, tuple[int, ...]] | None:
    """Match sqrt(mean(y^2) + epsilon), or its reciprocal; return nodes, y, epsilon and axes."""
    nodes: list[onnx.NodeProto] = []
    node = graph.maker(name)
    exponent = 0.5
    if inverse and node is not None and node.op_type == "Pow" and graph.scalar(node.input[1]) == -0.5:
        exponent = -0.5
    elif inverse:
        if node is None or node.op_type not in ("Reciprocal", "Div"):
            return None
        if node.op_type == "Div" and graph.scalar(node.input[0]) != 1.0:
            return None
        nodes.insert(0, node)
        node = graph.maker(node.input[-1])
    if node is None or node.op_type not in ("Sqrt", "Pow"):
        return None
    if node.op_type == "Pow" and graph.scalar(node.input[1]) != exponent:
        return None
    nodes.insert(0, node)
    node = graph.maker(node.input[0])
    if node is None or node.op_type != "Add":
        return None
    epsilons = [(value, other) for value, other in constant_sides(graph, node) if value is not None]
    if not epsilons or not 0 <= epsilons[0][0] < 1e-1:
        return None
    nodes.insert(0, node)
    mean = graph.maker(epsilons[0][1])
    if mean is None or mean.op_type != "ReduceMean" or not attribute_of(mean, "keepdims", 1):
        return None
    nodes.insert(0, mean)
    square = graph.maker(mean.input[0])
    if square is None:
        return None
    power = square.op_type == "Pow" and graph.scalar(square.input[1]) == 2.0
    product = square.op_type == "Mul" and graph.source(square.input[0]) == graph.source(square.input[1])
    if not (power or product):
        return None
    nodes.insert(0, square)
    return nodes, square.input[0], epsilons[0][0], _axes(graph, mean)


def conv_batch_norms(graph: Graph) -> Iterator[Match]:
    """Find a BatchNormalization behind a Conv. Parts: "conv", "norm"."""
    for node in graph.nodes:
        conv = graph.maker(node.input[0]) if node.op_type == "BatchNormalization" else None
        if conv is not None and conv.op_type == "Conv":
            yield Match(
                kind="conv-batch-norm",
                nodes=(conv, node),
                input=conv.input[0],
                output=node.output[0],
                parts={"conv": conv, "norm": node},
                quantizers=tuple(graph.quantizers_before(node.input[0])),
            )


def added_norms(graph: Graph, found: list[Match]) -> Iterator[Match]:
    """Find what is added before a LayerNorm: embeddings, or a residual. Part: "add"."""
    for norm in found:
        add = graph.maker(norm.input)
        if norm.kind != "layer-norm" or add is None or add.op_type != "Add":
            continue
        if any(graph.is_constant(name) for name in add.input):
            continue
        gathers = _gathers(graph, add)
        kind: Kind = "embedding-layer-norm" if gathers else "skip-layer-norm"
        yield Match(
            kind=kind,
            nodes=(*gathers, add, *norm.nodes),
            input=add.input[0],
            output=norm.output,
            parts={"add": add},
            quantizers=(*graph.quantizers_before(norm.input), *norm.quantizers),
        )


def _gathers(graph: Graph, add: onnx.NodeProto) -> tuple[onnx.NodeProto, ...]:
    """Return the look-ups of tables that an Add sums up, through other Adds; none if it adds more."""
    found: list[onnx.NodeProto] = []
    for name in add.input:
        node = graph.maker(name)
        if node is not None and node.op_type == "Gather" and graph.is_constant(node.input[0]):
            found.append(node)
        elif node is not None and node.op_type == "Add" and (deeper := _gathers(graph, node)):
            found += deeper
        elif not (node is not None and node.op_type == "Slice" and graph.is_constant(node.input[0])):
            return ()
    return tuple(found)


def quantizers_inside(graph: Graph, nodes: list[onnx.NodeProto], start: str) -> tuple[onnx.NodeProto, ...]:
    """Return the Q/DQ between a pattern's own nodes, its input left out."""
    outside = graph.source(start)
    own = {name for node in nodes for name in node.output}
    found: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        for name in node.input:
            source = graph.source(name)
            if source != outside and source in own:
                found.update((quantizer.output[0], quantizer) for quantizer in graph.quantizers_before(name))
    return tuple(found.values())


def constant_sides(graph: Graph, node: onnx.NodeProto) -> list[tuple[float | None, str]]:
    """Return ``(value, the other input)`` for each side of a binary node; None for what is computed."""
    left, right = node.input[0], node.input[1]
    return [
        (value, other)
        for value, other in ((graph.scalar(left), right), (graph.scalar(right), left))
        if value is not None
    ]


def only_reader(graph: Graph, name: str, op: str) -> onnx.NodeProto | None:
    """Return the node that alone reads a tensor, if it is an ``op``."""
    readers = graph.true_readers(name)
    return readers[0] if len(readers) == 1 and readers[0].op_type == op else None


def _same(graph: Graph, one: str, other: str) -> bool:
    """Say whether two tensors hold the same: the same source, or the same difference made twice."""
    a, b = graph.source(one), graph.source(other)
    if a == b:
        return True
    x, y = graph.made_by.get(a), graph.made_by.get(b)
    return (
        x is not None
        and y is not None
        and x.op_type == y.op_type == "Sub"
        and [graph.source(n) for n in x.input] == [graph.source(n) for n in y.input]
    )


def _along(value: npt.NDArray[Any] | None, axes: int) -> bool:
    """Say whether a constant differs along the last ``axes`` dimensions alone."""
    return value is not None and all(size == 1 for size in value.shape[: max(0, value.ndim - axes)])


def _axes(graph: Graph, node: onnx.NodeProto) -> tuple[int, ...]:
    axes = attribute_of(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        value = graph.constant(node.input[1])
        axes = None if value is None else value.reshape(-1).tolist()
    return tuple(int(axis) for axis in axes) if axes is not None else ()


def is_large_negative(value: npt.NDArray[Any] | None, limit: float) -> bool:
    """Say whether a constant holds a finite number below ``-limit``, as masks do."""
    if value is None or value.dtype.kind != "f" or not value.size:
        return False
    finite = value[np.isfinite(value)]
    return bool(finite.size and finite.min() < -limit)
