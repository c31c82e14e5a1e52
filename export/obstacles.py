"""What keeps a pattern from being fused: the node, and what a person can do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

from edgeglm.export.attention_scale import why_scale_stays
from edgeglm.export.emit import shapes_of
from edgeglm.export.graph import Graph, attribute_of, name_of, opset_of
from edgeglm.export.patterns import Match
from edgeglm.export.rewrites import LAYER_NORM_OPSET, why_no_layer_norm

Obstacle = tuple[str, str]
_PRODUCTS = ("Conv", "MatMul", "Gemm")
_AFTER_PRODUCT = ("BatchNormalization", "Relu", "Clip", "Add", "Gelu", "Sigmoid", "HardSwish")


def tensorrt_obstacle(graph: Graph, match: Match) -> Obstacle | None:
    """Return what TensorRT's documentation says against fusing a pattern; None when nothing does."""
    if match.quantizers:
        return name_of(match.quantizers[0]), f"it quantizes inside the {match.kind}; take that Q/DQ pair out"
    if match.kind in ("layer-norm", "rms-norm") and match.decomposed:
        return (
            name_of(match.parts["square"]),
            "it is written out, so its squares are computed in the graph's own precision; "
            + _norm_remedy(graph, match),
        )
    if match.nodes[-1].op_type == "RMSNormalization":
        return (
            name_of(match.nodes[-1]),
            "the parser of TensorRT 10.1 has no RMSNormalization; write it out: edgeglm lower --lane B",
        )
    if match.kind == "attention" and "softmax" in match.parts:
        return _attention_obstacle(graph, match)
    if match.kind == "conv-batch-norm":
        return _elsewhere(graph, match)
    return None


def _norm_remedy(graph: Graph, match: Match) -> str:
    if match.kind == "rms-norm":
        return "keep it in FP32"
    why = why_no_layer_norm(graph, match, shapes_of(graph.model))
    if not why:
        return "fuse it: edgeglm fusions --write"
    if opset_of(graph.model) < LAYER_NORM_OPSET:
        return f"{why}, so raise it first: edgeglm lower --lane B"
    return f"{why}, so keep it in FP32"


def _attention_obstacle(graph: Graph, match: Match) -> Obstacle | None:
    softmax, scale = match.parts["softmax"], match.parts.get("scale")
    if attribute_of(softmax, "axis", -1) not in (-1, 3):
        return name_of(softmax), "it goes over another axis than the last; transpose before it"
    if scale is not None:
        return (
            name_of(scale),
            "the scale stands behind the first product, and TensorRT asks for it before; "
            + (why_scale_stays(graph, match) or "fold it: edgeglm fusions --write"),
        )
    bmm1, bmm2 = match.parts["bmm1"], match.parts["bmm2"]
    sides = {
        "queries": (bmm1.input[0], bmm1), "keys": (bmm1.input[1], bmm1),
        "probabilities": (bmm2.input[0], bmm2), "values": (bmm2.input[1], bmm2),
    }  # fmt: skip
    plain = [(what, node) for what, (name, node) in sides.items() if not graph.is_quantized(name)]
    if 0 < len(plain) < len(sides):
        what, node = plain[0]
        return name_of(
            node
        ), f"its {what} are not quantized while others are; quantize all four inputs or none"
    return _elsewhere(graph, match)


def onnxruntime_obstacle(graph: Graph, match: Match) -> Obstacle:
    """Return the node that ONNX Runtime's optimizer stumbles over."""
    if match.quantizers:
        return name_of(match.quantizers[0]), f"it quantizes inside the {match.kind}; take that Q/DQ pair out"
    if match.kind == "attention" and "softmax" in match.parts:
        return _onnxruntime_attention(graph, match)
    if (found := _elsewhere(graph, match)) is not None:
        return found
    if match.kind in ("skip-layer-norm", "embedding-layer-norm"):
        add = match.parts["add"]
        known = shapes_of(graph.model)
        shapes = [known.get(name) for name in add.input]
        if any(shape is None or len(shape) != 3 for shape in shapes):
            return name_of(
                add
            ), "it adds tensors that are not known to have three dimensions; fix their shapes"
        return (
            name_of(add),
            "its symbolic shape inference does not show that both sides have one shape; "
            "rewrite it: edgeglm fusions --write --for onnxruntime",
        )
    return name_of(match.nodes[0]), "it is written in a form that its optimizer does not know"


def _onnxruntime_attention(graph: Graph, match: Match) -> Obstacle:
    names = [name for role in ("query", "key", "value") for name in (match.tensors[role],)]
    for role in ("query", "key", "value"):
        projection = match.parts.get(role)
        if projection is None:
            maker = graph.maker(match.tensors[role])
            at = name_of(maker) if maker is not None else match.tensors[role]
            return (
                at,
                f"the {role} comes from no product with constant weights; it stays a product of its own",
            )
        if graph.quantizers_before(projection.input[1]):
            return name_of(projection), "its weights are quantized; fuse before quantizing"
    for name in names:
        for node in _on_the_way(graph, name):
            if node.op_type == "Reshape" and not graph.is_constant(node.input[1]):
                return (
                    name_of(node),
                    "its shape is computed, so that the number of heads is not to be read from it; "
                    "rewrite it: edgeglm fusions --write --for onnxruntime",
                )
    mask = match.parts.get("mask")
    if mask is not None:
        return name_of(
            mask
        ), "its mask is made in a way that the optimizer does not know; pass it as an input"
    return name_of(match.parts["bmm1"]), "it is written in a form that its optimizer does not know"


def _on_the_way(graph: Graph, name: str) -> Iterator[onnx.NodeProto]:
    for _ in range(8):
        node = graph.maker(name)
        if node is None or node.op_type in _PRODUCTS:
            return
        yield node
        computed = [side for side in node.input if side and not graph.is_constant(side)]
        if not computed:
            return
        name = computed[0]


def _elsewhere(graph: Graph, match: Match) -> Obstacle | None:
    """Return a node inside the pattern whose result is used outside of it."""
    own = {node.output[0] for node in match.nodes}
    for node in match.nodes:
        if node.output[0] == match.output or node.op_type == "Gather":
            continue
        others = [r for r in graph.true_readers(node.output[0]) if not own & set(r.output)]
        shared = match.kind in ("skip-layer-norm", "embedding-layer-norm") and node is match.parts.get("add")
        if node.output[0] in graph.outputs:
            return name_of(node), "its result is an output of the graph too; take that output out"
        if others and not shared:
            return name_of(node), f"{name_of(others[0])} reads its result too; compute it apart there"
    return None


def quantizer_notes(graph: Graph, matches: Sequence[Match]) -> Iterator[tuple[str, str]]:
    """Yield ``(Q/DQ node, why it breaks a fusion)``."""
    for match in matches:
        for node in match.quantizers:
            if node.op_type == "QuantizeLinear":
                yield (
                    name_of(node),
                    f"it stands inside the {match.kind} that ends with {name_of(match.nodes[-1])}",
                )
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear":
            continue
        before = graph.made_by.get(node.input[0])
        while before is not None and before.op_type == "Cast":
            before = graph.made_by.get(before.input[0])
        if (
            before is not None
            and before.op_type == "DequantizeLinear"
            and not graph.is_constant(node.input[0])
        ):
            yield (
                name_of(node),
                f"it quantizes again what {name_of(before)} has just dequantized; keep one pair",
            )
        if before is None or before.op_type not in _PRODUCTS:
            continue
        for reader in graph.true_readers(node.output[0]):
            if _finishes(graph, reader):
                yield (
                    name_of(node),
                    f"it stands between {name_of(before)} and {name_of(reader)}, one kernel without it; "
                    "quantize the inputs of products and not their outputs",
                )


def _finishes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Say whether a node is what a product's kernel does last: a bias, a norm, an activation."""
    op, inputs = node.op_type, node.input
    return op in _AFTER_PRODUCT and (op != "Add" or any(graph.is_constant(name) for name in inputs))
