"""Graph passes that make patterns into what every runtime fuses: standard operators in, standard out.

LayerNorm and GELU become their operators, BatchNorm goes into its Conv, three projections of one input
become one product, and attention's scale goes before its first product, where TensorRT asks for it
(NVIDIA TensorRT documentation, "Fused Attention"). A pass takes a whole pattern or leaves it; it never
touches one with Q/DQ inside.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeglm.export.anonymous import save_deterministic
from edgeglm.export.attention import attentions
from edgeglm.export.attention_scale import fold_scales
from edgeglm.export.emit import shapes_of, types_of
from edgeglm.export.gelus import gelus
from edgeglm.export.graph import (
    Graph,
    attribute_of,
    drop_unused,
    model_from_file,
    name_of,
    named,
    opset_of,
    replace_nodes,
    sorted_nodes,
)
from edgeglm.export.merged import merged_projection
from edgeglm.export.patterns import Match, conv_batch_norms, norms
from edgeglm.export.rewritten import Rewritten

LAYER_NORM_OPSET, _GELU_OPSET = 17, 20

Pass = Callable[[onnx.ModelProto, Rewritten], None]


def rewrite(model: onnx.ModelProto, passes: tuple[Pass, ...] | None = None) -> Rewritten:
    """Run passes on ``model`` in place, all of them in their order unless some are given."""
    named(model)
    done = Rewritten()
    for one in passes or ALL:
        one(model, done)
        drop_unused(model.graph)
        sorted_nodes(model.graph)
    model.graph.ClearField("value_info")
    return done


def file_with_scales_before(path: Path, out: Path) -> Path:
    """Write ``out`` with every scale before its product and return it; ``path`` where none has to move.

    Names of nodes and of what products read stay. Raises UserError when the file cannot be read.
    """
    model = model_from_file(path)
    return save_deterministic(model, out) if rewrite(model, (fold_scales,)).made else path


def fuse_layer_norms(model: onnx.ModelProto, done: Rewritten) -> None:
    """Make decomposed LayerNorms the operator, which sums up in FP32 whatever its inputs are."""
    graph = Graph(model)
    shapes, types = shapes_of(model), types_of(model)
    for match in norms(graph):
        if match.kind != "layer-norm" or not match.decomposed:
            continue
        name = name_of(match.nodes[-1])
        why = why_no_layer_norm(graph, match, shapes)
        if why:
            done.kept[name] = why
            continue
        shape = shapes[match.input]
        dims = [int(d) for d in shape[-len(match.axes) :] if d is not None]
        inputs = [match.input]
        for role, value in (("scale", 1.0), ("bias", 0.0)):
            constant = graph.constant(match.tensors[role]) if match.tensors[role] else None
            kind = helper.tensor_dtype_to_np_dtype(types.get(match.input, onnx.TensorProto.FLOAT))
            if constant is None:
                whole = np.full(dims, value, kind)
            else:
                whole = np.broadcast_to(constant.reshape(constant.shape[-len(dims) :]), dims)
            if role == "bias" and constant is None:
                continue
            inputs.append(f"{name}/{role}")
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(whole), inputs[-1]))
        node = helper.make_node(
            "LayerNormalization", inputs, [match.output], name=f"{name}/LayerNormalization",
            axis=-len(match.axes), epsilon=match.epsilon,
        )  # fmt: skip
        _put(model, match, [node])
        done.made.setdefault("layer-norm", []).append(node.name)


def why_no_layer_norm(graph: Graph, match: Match, shapes: dict[str, tuple[int | None, ...]]) -> str:
    """Return why a LayerNorm that is written out cannot be the operator; "" where it can."""
    if opset_of(graph.model) < LAYER_NORM_OPSET:
        return f"opset {opset_of(graph.model)} has no LayerNormalization"
    if match.quantizers:
        return f"{name_of(match.quantizers[0])} quantizes inside"
    shape = shapes.get(match.input)
    if shape is None or not match.axes:
        return "its axes or the shape of its input are unknown"
    axes = sorted(axis - len(shape) if axis >= 0 else axis for axis in match.axes)
    if axes != list(range(-len(axes), 0)):
        return "it goes over other axes than the last ones"
    if any(dim is None for dim in shape[-len(axes) :]):
        return "the dimensions that it goes over are free"
    for role in ("scale", "bias"):
        value = graph.constant(match.tensors[role]) if match.tensors[role] else None
        if value is not None and value.ndim > len(shape):
            return f"its {role} has more dimensions than its input"
    return ""


def fuse_gelus(model: onnx.ModelProto, done: Rewritten) -> None:
    """Make GELUs that are written out the operator, from opset 20 on; one by a sigmoid is none."""
    for match in gelus(Graph(model)):
        if not match.decomposed or match.tensors["approximate"] == "sigmoid":
            continue
        name = name_of(match.nodes[-1])
        if opset_of(model) < _GELU_OPSET or match.quantizers:
            done.kept[name] = (
                f"{name_of(match.quantizers[0])} quantizes inside"
                if match.quantizers
                else f"opset {opset_of(model)} has no Gelu"
            )
            continue
        node = helper.make_node(
            "Gelu",
            [match.input],
            [match.output],
            name=f"{name}/Gelu",
            approximate=match.tensors["approximate"],
        )
        _put(model, match, [node])
        done.made.setdefault("gelu", []).append(node.name)


def fold_batch_norms(model: onnx.ModelProto, done: Rewritten) -> None:
    """Multiply each BatchNorm into the Conv before it."""
    graph = Graph(model)
    for match in conv_batch_norms(graph):
        conv, norm = match.parts["conv"], match.parts["norm"]
        values = [graph.constant(name) for name in (conv.input[1], *norm.input[1:5])]
        bias = graph.constant(conv.input[2]) if len(conv.input) > 2 and conv.input[2] else None
        name = name_of(norm)
        if match.quantizers or graph.quantizers_before(conv.input[1]):
            done.kept[name] = "Q/DQ stand between the Conv, its weights and the norm"
        elif any(value is None for value in values) or (
            bias is None and len(conv.input) > 2 and conv.input[2]
        ):
            done.kept[name] = "its weights are computed"
        elif len(graph.true_readers(conv.output[0])) != 1 or conv.output[0] in graph.outputs:
            done.kept[name] = f"{name_of(conv)} is read elsewhere too"
        elif any(norm.output[1:]):
            done.kept[name] = "it is a norm in training"
        else:
            weight, scale, shift, mean, variance = (np.asarray(v, np.float64) for v in values)
            factor = scale / np.sqrt(variance + attribute_of(norm, "epsilon", 1e-5))
            offset = (0.0 if bias is None else np.asarray(bias, np.float64)) - mean
            kind = values[0].dtype if values[0] is not None else np.float32
            folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
            inputs = [conv.input[0]]
            for role, value in (("weight", folded), ("bias", offset * factor + shift)):
                inputs.append(f"{name}/{role}")
                model.graph.initializer.append(numpy_helper.from_array(value.astype(kind), inputs[-1]))
            node = onnx.NodeProto()
            node.CopyFrom(conv)
            node.input[:], node.output[:] = inputs, [match.output]
            _put(model, match, [node])
            done.made.setdefault("conv-batch-norm", []).append(node.name)


def _put(model: onnx.ModelProto, match: Match, nodes: list[onnx.NodeProto]) -> None:
    """Put ``nodes`` where the pattern's last node was; what only the pattern read falls out later."""
    last = match.nodes[-1].output[0]
    assert last == match.output
    kept: list[onnx.NodeProto] = []
    for node in model.graph.node:
        kept += nodes if node.output[:1] == [last] else [node]
    replace_nodes(model.graph, kept)


def merge_projections(model: onnx.ModelProto, done: Rewritten) -> None:
    """Make the queries', keys' and values' products of one input one product, split afterwards."""
    for anchor in [name_of(m.parts["softmax"]) for m in attentions(Graph(model)) if "softmax" in m.parts]:
        graph = Graph(model)
        match = next(m for m in attentions(graph) if name_of(m.parts.get("softmax", m.nodes[0])) == anchor)
        merged = merged_projection(graph, match)
        if isinstance(merged, str):
            done.kept[anchor] = merged
            continue
        nodes, tensors, gone = merged
        model.graph.initializer.extend(tensors)
        kept: list[onnx.NodeProto] = []
        for node in model.graph.node:
            if node.output[0] == gone[0]:
                kept += nodes
            elif node.output[0] not in gone:
                kept.append(node)
        replace_nodes(model.graph, kept)
        done.made.setdefault("qkv-projections", []).append(nodes[0].name)


ALL: tuple[Pass, ...] = (fuse_layer_norms, fuse_gelus, fold_batch_norms, fold_scales, merge_projections)
