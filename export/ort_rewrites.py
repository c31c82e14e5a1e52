"""Attention and skip-LayerNorm as ONNX Runtime's own operators, where its optimizer does not see them.

It reads the number of heads from constant shapes and asks its symbolic shape inference whether two sides of
an Add are alike; graphs of ``torch.export`` have neither. Here the heads are read from inferred shapes. The
result is for ONNX Runtime only: TensorRT knows none of these operators.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeglm.export.attention import attentions
from edgeglm.export.attention_scale import factor_of
from edgeglm.export.emit import inferred, types_of
from edgeglm.export.graph import Graph, attribute_of, drop_unused, name_of, named, replace_nodes, sorted_nodes
from edgeglm.export.patterns import Match, norms
from edgeglm.export.rewrites import fold_batch_norms, fuse_gelus, fuse_layer_norms, rewrite
from edgeglm.export.rewritten import Rewritten

_DOMAIN = "com.microsoft"
_HEADS_FIRST, _KEYS_LAST = [0, 2, 1, 3], [0, 2, 3, 1]
_ONE = np.array([1], np.int64)
_Dims = dict[str, list[int | str]]


def rewrite_for_onnxruntime(model: onnx.ModelProto) -> Rewritten:
    """Fuse, in place, what ONNX Runtime runs as one operator, and what standard operators can say first.

    Attention without Q/DQ becomes ``com.microsoft.MultiHeadAttention``; a residual Add before a LayerNorm
    ``com.microsoft.SkipLayerNormalization``.
    """
    done = rewrite(model, (fuse_layer_norms, fuse_gelus, fold_batch_norms))
    if all(entry.domain != _DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    for one in (_fuse_skip_norms, _fuse_attention):
        one(model, done)
        drop_unused(model.graph)
        sorted_nodes(model.graph)
        named(model)
    return done


def _fuse_attention(model: onnx.ModelProto, done: Rewritten) -> None:
    for anchor in [name_of(m.parts["softmax"]) for m in attentions(Graph(model)) if "softmax" in m.parts]:
        graph = Graph(model)
        match = next(m for m in attentions(graph) if name_of(m.parts.get("softmax", m.nodes[0])) == anchor)
        made = _attention_node(graph, match)
        if isinstance(made, str):
            done.kept[anchor] = made
            continue
        nodes, tensors, replaced = made
        model.graph.initializer.extend(tensors)
        kept: list[onnx.NodeProto] = []
        for node in model.graph.node:
            kept += nodes if node.output[:1] == [replaced] else [node]
        replace_nodes(model.graph, kept)
        done.made.setdefault("attention", []).append(nodes[-1].name)


def _attention_node(
    graph: Graph, match: Match
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str] | str:
    """Return the nodes in the place of an attention, or why there are none."""
    bmm1, bmm2 = match.parts["bmm1"], match.parts["bmm2"]
    sides = ((bmm1.input[0], _HEADS_FIRST), (bmm1.input[1], _KEYS_LAST), (bmm2.input[1], _HEADS_FIRST))
    rows = [_unsplit(graph, name, perm) for name, perm in sides]
    out = _merged(graph, bmm2.output[0])
    if None in rows or out is None:
        return "its heads are split or merged in another way"
    steps = [n for n in match.nodes if n.op_type not in ("MatMul", "Softmax")]
    extra = [n for n in steps if n is not match.parts.get("scale") and n is not match.parts.get("mask")]
    scale, mask = match.parts.get("scale"), match.parts.get("mask")
    if extra or (mask is not None and mask.op_type != "Add"):
        return "something else than a scale and an added mask stands between its products"
    if scale is not None and mask is not None and steps.index(scale) > steps.index(mask):
        return "its mask is scaled too"
    heads = _heads(graph, match)
    if heads is None:
        return "the number of its heads is unknown"
    name = f"{name_of(match.parts['softmax'])}/MultiHeadAttention"
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    steps_out = _steps_outputs(match)
    added = [side for side in (mask.input if mask is not None else ()) if graph.source(side) not in steps_out]
    if mask is not None and len(added) != 1:
        return "its mask is made of the product itself"
    types = types_of(graph.model)
    if len({types.get(side) for side in (*map(str, rows), *added, out)}) > 1:
        return "it computes in several precisions, and the operator in one"
    bias = _whole_mask(name, added[0], str(rows[0]), nodes, tensors) if added else ""
    factor = 1.0 if scale is None else factor_of(graph, scale)
    if factor is None:
        return "its scale is computed, or divided by the product"
    inputs = [*map(str, rows), "", "", *([bias] if bias else [])]
    nodes.append(
        helper.make_node(
            "MultiHeadAttention", inputs[: 6 if bias else 3], [out], name=name, domain=_DOMAIN,
            num_heads=heads, scale=factor,
        )
    )  # fmt: skip
    return nodes, tensors, out


def _unsplit(graph: Graph, name: str, perm: list[int]) -> str | None:
    """Return the [B, S, N*D] tensor whose heads were split into ``name``."""
    node = graph.made_by.get(name)
    order = [0, 1, 2, 3]
    while node is not None and node.op_type == "Transpose":
        order = [attribute_of(node, "perm")[axis] for axis in order]
        name = node.input[0]
        node = graph.made_by.get(name)
    if order != perm or node is None or node.op_type != "Reshape":
        return None
    return str(node.input[0])


def _heads(graph: Graph, match: Match) -> int | None:
    """Return the width of the queries over that of a head, the last number of the shape that splits them."""
    query, split = match.parts.get("query"), graph.made_by.get(match.tensors["query"])
    while split is not None and split.op_type == "Transpose":
        split = graph.made_by.get(split.input[0])
    weight = graph.constant(query.input[1]) if query is not None else None
    if weight is None or split is None or split.op_type != "Reshape":
        return None
    shape, maker = graph.constant(split.input[1]), graph.made_by.get(split.input[1])
    if shape is not None:
        head = int(shape.reshape(-1)[-1])
    elif maker is not None and maker.op_type == "Concat" and (last := graph.scalar(maker.input[-1])):
        head = int(last)
    else:
        return None
    return weight.shape[-1] // head if head > 0 and weight.shape[-1] % head == 0 else None


def _merged(graph: Graph, name: str) -> str | None:
    """Return the [B, S, N*D] tensor that the heads of ``name`` are merged into."""
    for op in ("Transpose", "Reshape"):
        readers = graph.readers.get(name, [])
        if len(readers) != 1 or readers[0].op_type != op:
            return None
        if op == "Transpose" and attribute_of(readers[0], "perm") != _HEADS_FIRST:
            return None
        name = readers[0].output[0]
    return name


def _whole_mask(
    name: str, mask: str, rows: str, nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]
) -> str:
    """Give a mask [B, 1, 1, T] the dimension of the queries, which the operator does not broadcast."""
    one, sizes, length, shape, whole = (
        f"{name}/{part}" for part in ("one", "sizes", "length", "shape", "mask")
    )
    tensors.append(numpy_helper.from_array(_ONE, one))
    nodes.append(helper.make_node("Shape", [rows], [sizes], name=f"{sizes}/Shape"))
    nodes.append(helper.make_node("Gather", [sizes, one], [length], name=f"{length}/Gather"))
    nodes.append(helper.make_node("Concat", [one, one, length, one], [shape], name=f"{shape}/Concat", axis=0))
    nodes.append(helper.make_node("Expand", [mask, shape], [whole], name=f"{whole}/Expand"))
    return whole


def _fuse_skip_norms(model: onnx.ModelProto, done: Rewritten) -> None:
    graph, dims = Graph(model), _dims(model)
    chosen: dict[str, onnx.NodeProto] = {}
    dropped: set[str] = set()
    for match in norms(graph):
        norm, add = match.nodes[-1], graph.made_by.get(match.input)
        if match.kind != "layer-norm" or match.decomposed or add is None or add.op_type != "Add":
            continue
        if attribute_of(norm, "axis", -1) not in (-1, 2):
            done.kept[name_of(add)] = "its norm goes over more than the last dimension"
            continue
        one, other = (dims.get(name) for name in add.input)
        if one is None or other is None or not _alike(one, other) or not match.tensors["scale"]:
            done.kept[name_of(add)] = "its two sides are not known to have one shape of three dimensions"
            continue
        more = graph.readers[add.output[0]]
        outputs = [norm.output[0], *(["", "", add.output[0]] if len(more) > 1 else [])]
        inputs = [*add.input, match.tensors["scale"], match.tensors["bias"]]
        chosen[add.output[0]] = helper.make_node(
            "SkipLayerNormalization", inputs if inputs[3] else inputs[:3], outputs,
            name=f"{name_of(norm)}/Skip", domain=_DOMAIN, epsilon=match.epsilon,
        )  # fmt: skip
        dropped.add(norm.output[0])
        done.made.setdefault("skip-layer-norm", []).append(chosen[add.output[0]].name)
    kept = []
    for node in model.graph.node:
        if node.output[0] in chosen:
            kept.append(chosen[node.output[0]])
        elif node.output[0] not in dropped:
            kept.append(node)
    replace_nodes(model.graph, kept)


def _dims(model: onnx.ModelProto) -> _Dims:
    """Return shapes with the names of free dimensions, "?" for an unknown one."""
    graph = onnx.shape_inference.infer_shapes(inferred(model), data_prop=True).graph
    return {
        value.name: [
            d.dim_value if d.HasField("dim_value") else d.dim_param or "?"
            for d in value.type.tensor_type.shape.dim
        ]
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _alike(one: list[int | str], other: list[int | str]) -> bool:
    """Say whether nothing that is known of two shapes differs, and neither side is repeated."""
    pairs = list(zip(one, other, strict=False))
    return len(one) == len(other) == 3 and all(
        a != 1 and b != 1 and (a == b or "?" in (a, b)) for a, b in pairs
    )


def _steps_outputs(match: Match) -> set[str]:
    return {node.output[0] for node in match.nodes}
