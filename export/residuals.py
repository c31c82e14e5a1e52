"""Two things that TensorRT's documentation asks for around INT8: shared inputs and quantized residuals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from edgeglm.export.graph import Graph, name_of
from edgeglm.export.patterns import Match

_PRODUCTS = ("Conv", "MatMul", "Gemm")
_KEEPS = ("Add", "Relu", "Clip", "Gelu", "Sigmoid", "Mul", "Reshape", "Transpose", "BatchNormalization")

Found = tuple[str, str, str]
"""The node it is about, the node that prevents it ("" for none), why."""


def shared_projections(graph: Graph, matches: Sequence[Match]) -> Iterator[Found]:
    """Say of each attention whether its projections can be one product: of one input, quantized alike."""
    for match in matches:
        projections = [match.parts[role] for role in ("query", "key", "value") if role in match.parts]
        if len(projections) < 3:
            continue
        at = name_of(projections[0])
        if len({name_of(node) for node in projections}) == 1:
            yield at, "", ""  # it is one product already
            continue
        sources = [graph.source(node.input[0]) for node in projections]
        odd = next((n for n, s in zip(projections, sources, strict=True) if s != sources[0]), None)
        scales = [_scale(graph, node) for node in projections]
        other = next((n for n, s in zip(projections, scales, strict=True) if s != scales[0]), None)
        if odd is not None:
            yield at, name_of(odd), "it reads another tensor than the queries do, as cross-attention does"
        elif other is not None:
            yield at, name_of(other), "its input is quantized otherwise; give the shared tensor one Q/DQ pair"
        else:
            yield at, "", ""


def quantized_residuals(graph: Graph) -> Iterator[Found]:
    """Say of each residual Add behind an INT8 product whether its other side is quantized too.

    TensorRT then adds in the product's own kernel (NVIDIA TensorRT documentation, "Q/DQ Placement").
    """
    pairs = dequantized(graph)
    for node, index in residual_adds(graph, pairs):
        shortcut = node.input[index]
        if any(graph.quantizers_before(name) for name in node.input):
            yield name_of(node), "", ""
            continue
        maker = graph.maker(shortcut)
        yield (
            name_of(node),
            name_of(maker) if maker is not None else shortcut,
            "the other side of the residual is not quantized, so it is added in a kernel of its own; "
            + (
                "an INT8 product reads that side through a Q/DQ pair: let the sum read it too, where the "
                "gate allows (residuals = true in a precision plan)"
                if graph.source(shortcut) in pairs
                else "no INT8 product reads that side, so that a Q/DQ pair of its own would be one kernel "
                "more"
            ),
        )


def dequantized(graph: Graph) -> dict[str, list[str]]:
    """Return ``{activation: what its Q/DQ pairs make of it}``."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and not graph.is_constant(node.output[0]):
            found.setdefault(graph.source(node.output[0]), []).append(node.output[0])
    return found


def residual_adds(graph: Graph, pairs: Mapping[str, Sequence[str]]) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Yield each Add of two computed tensors behind an INT8 product, and which input is its other side.

    Where products make both, as in inverted bottlenecks, the other side is the one with a pair.
    """
    for node in graph.nodes:
        if node.op_type != "Add" or any(_is_learned(graph, name) for name in node.input):
            continue
        fed = [index for index, name in enumerate(node.input) if _comes_from_int8(graph, name)]
        others = [index for index in (0, 1) if fed not in ([], [index])]
        if others:
            yield node, next((i for i in others if graph.source(node.input[i]) in pairs), others[0])


def _scale(graph: Graph, node: onnx.NodeProto) -> tuple[float, ...]:
    """Return the scales that a product's input was quantized with; none for a plain one."""
    quantizers = graph.quantizers_before(node.input[0])
    return tuple(value for q in quantizers if (value := graph.scalar(q.input[1])) is not None)


def _is_learned(graph: Graph, name: str) -> bool:
    """Say whether a tensor is a constant, or rows of one, such as embeddings of positions."""
    node = graph.maker(name)
    if node is not None and node.op_type in ("Slice", "Gather", "Expand"):
        name = node.input[0]
    return graph.is_constant(name)


def _comes_from_int8(graph: Graph, name: str) -> bool:
    """Say whether a tensor comes, through cheap steps, from a product that computes in INT8."""
    for _ in range(5):
        node = graph.maker(name)
        if node is None:
            return False
        if node.op_type in _PRODUCTS:
            return bool(graph.quantizers_before(node.input[0]))
        computed = [side for side in node.input if side and not graph.is_constant(side)]
        if node.op_type not in _KEEPS or len(computed) != 1:
            return False
        name = computed[0]
    return False
