"""Two things that TensorRT's documentation asks for around INT8: shared inputs and quantized residuals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

from edgeglm.export.graph import QUANTIZERS, Graph, name_of
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
    for node in graph.nodes:
        if node.op_type != "Add" or any(graph.is_constant(name) for name in node.input):
            continue
        sides = [(name, _int8_product(graph, name)) for name in node.input]
        fed = [name for name, product in sides if product is not None]
        if not fed:
            continue
        shortcut = next((name for name, product in sides if product is None), node.input[0])
        if any(graph.quantizers_before(name) for name in (shortcut, *node.input)):
            yield name_of(node), "", ""
        else:
            maker = graph.maker(shortcut)
            yield (
                name_of(node),
                name_of(maker) if maker is not None else shortcut,
                "the other side of the residual is not quantized, so it is added in a kernel of its own; "
                "quantize it where its outliers allow",
            )


def _scale(graph: Graph, node: onnx.NodeProto) -> tuple[float, ...]:
    """Return the scales that a product's input was quantized with; none for a plain one."""
    quantizers = graph.quantizers_before(node.input[0])
    return tuple(value for q in quantizers if (value := graph.scalar(q.input[1])) is not None)


def _int8_product(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the product of dequantized values that a tensor comes from, through cheap steps."""
    for _ in range(5):
        node = graph.made_by.get(name)
        while node is not None and node.op_type in ("Cast", "Identity", *QUANTIZERS):
            node = graph.made_by.get(node.input[0])
        if node is None:
            return None
        if node.op_type in _PRODUCTS:
            return node if graph.quantizers_before(node.input[0]) else None
        computed = [side for side in node.input if side and not graph.is_constant(side)]
        if node.op_type not in _KEEPS or len(computed) != 1:
            return None
        name = computed[0]
    return None
