"""An ONNX file written for the operator set of an older runtime: lanes A and B.

``torch.export`` writes opset 18 at the least, and ``onnx.version_converter`` goes down from there for no
graph with LayerNormalization, Gelu or a reduction. This pass does: an operator that changed is written
with older ones (:mod:`edgeglm.export.equivalents`, or the graph that the specification itself gives for
it), one that did not is kept as it is, and anything else is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import defs, helper, inliner

from edgeglm.core.errors import UserError
from edgeglm.export.anonymous import save_deterministic, strip_traces
from edgeglm.export.emit import Emitter, inferred, shapes_of, types_of
from edgeglm.export.equivalents import COMPOSED, EQUIVALENTS, Equivalent
from edgeglm.export.graph import (
    Graph,
    all_nodes,
    attribute_of,
    drop_unused,
    inner_graphs,
    model_from_file,
    named,
    opset_of,
    replace_nodes,
)
from edgeglm.export.plain import plain, require_standard
from edgeglm.export.softmaxes import join_softmaxes
from edgeglm.export.widen import float_weights, widen

LANE_A_OPSET = 16
LANE_B_OPSETS = (19, 20)
_OLDEST_READABLE = 13
_SOFTMAX_OF_ONE_AXIS = 13
_IR_VERSION = {16: 8, 19: 9, 20: 9}
_STANDARD = ("", "ai.onnx")
_NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_SQUARES = ("InstanceNormalization", "LpNormalization", "ReduceL2", "ReduceSumSquare")
"""They add up squares inside, beyond FP16 for values above 255."""


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A model for an older runtime.

    Attributes:
        model: The model; its only operator set is the standard one of ``opset``.
        rewritten: Operator -> how many nodes were written with others.
        fp32_nodes: Nodes that a builder which may choose FP16 has to keep in FP32: every step of a
            normalization up to its division, and what the caller named.
        widened: How many FP16 weights became FP32.
        quantized: How many INT8 weights became floats behind Q/DQ.
    """

    model: onnx.ModelProto
    opset: int
    rewritten: dict[str, int] = field(default_factory=dict)
    fp32_nodes: tuple[str, ...] = ()
    widened: int = 0
    quantized: int = 0


def lane_a_from_onnx(path: Path, out: Path, *, keep_fp32: Sequence[str] = ()) -> Lowered:
    """Write the lane A file of an ONNX file: opset 16, FP32 with Q/DQ, for TensorRT 8.5.

    LayerNorm and GELU are decomposed, FP16 is widened, INT8 weights become floats behind Q/DQ pairs, and
    inputs of FP16 become FP32. Names of tensors and of kept nodes stay.

    Args:
        path: Any ONNX file; not changed.
        out: Where the file goes.
        keep_fp32: Nodes that must not compute in FP16 in any case, such as those that AutoCast kept.

    Raises:
        UserError: The file cannot be read, or a node has no equivalent; the message names it.
    """
    lowered = lane_a(model_from_file(path), keep_fp32=keep_fp32)
    save_deterministic(lowered.model, out)
    return lowered


def lane_a(model: onnx.ModelProto, *, keep_fp32: Sequence[str] = ()) -> Lowered:
    """Return the lane A form of a model; see :func:`lane_a_from_onnx`."""
    work = _prepared(model)
    if opset_of(work) < LANE_A_OPSET:
        work = raised(work, LANE_A_OPSET)  # a default may differ: RoiAlign's did in 16
    widened = widen(work)
    quantized = float_weights(work)
    rewritten, sensitive = _lower(work, LANE_A_OPSET)
    fused_norms = [node.name for node in work.graph.node if node.op_type in _SQUARES]
    pinned = {*sensitive, *fused_norms, *keep_fp32}
    parts = tuple(f"{name}/" for name in keep_fp32)  # what such a node was written with
    order = [n.name for n in work.graph.node if n.name in pinned or n.name.startswith(parts)]
    return Lowered(
        model=_finished(work),
        opset=opset_of(work),
        rewritten=rewritten,
        fp32_nodes=tuple(order),
        widened=widened,
        quantized=quantized,
    )


def lane_b(model: onnx.ModelProto) -> Lowered:
    """Return a model written for opset 19 or 20, which TensorRT 10.3 and later parse.

    An older one is raised to 19, a newer one lowered to 20; precisions stay. Raises UserError for a node
    with no equivalent.
    """
    work = _prepared(model)
    opset, (low, high) = opset_of(work), LANE_B_OPSETS
    if opset < low:
        work = raised(work, low)
        return Lowered(model=_finished(work), opset=low)
    if opset <= high:
        return Lowered(model=_finished(work), opset=opset)
    rewritten, sensitive = _lower(work, high)
    return Lowered(model=_finished(work), opset=high, rewritten=rewritten, fp32_nodes=tuple(sensitive))


def _prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    work = onnx.ModelProto()
    work.CopyFrom(model)
    plain(work)
    require_standard(work)
    if opset_of(work) < _OLDEST_READABLE:
        work = raised(work, _OLDEST_READABLE)
    named(work)
    for node in work.graph.node:
        # trtexec takes a list of "name:precision" between commas, as one word.
        node.name = "".join("_" if c in ",: \t\n*" else c for c in node.name)
    return work


def raised(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return an older model for a newer operator set. Raises UserError where onnx has no converter."""
    try:
        made = onnx.version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"onnx cannot raise the model from opset {opset_of(model)} to {opset}: {reason}; "
            "export it again with a newer opset"
        ) from error
    if opset_of(model) < _SOFTMAX_OF_ONE_AXIS <= opset:
        join_softmaxes(made)
    return made


def _lower(model: onnx.ModelProto, opset: int) -> tuple[dict[str, int], list[str]]:
    """Rewrite, in place, what ``opset`` does not have. Returns what was rewritten and what overflows."""
    before = opset_of(model)
    if before <= opset:
        return {}, []
    newer = {
        node.op_type
        for node in all_nodes(model.graph)
        if node.op_type in COMPOSED and _since(node.op_type, before) > opset
    }
    rewritten: Counter[str] = Counter(
        node.op_type for node in all_nodes(model.graph) if node.op_type in newer
    )
    if newer:
        inlined = inliner.inline_selected_functions(
            model, [("", op) for op in newer], inline_schema_functions=True
        )
        model.CopyFrom(inlined)
        named(model)
    sensitive: list[str] = []
    shapes, types = shapes_of(model), types_of(model)
    _lower_graph(model.graph, Graph(model), opset, before, (shapes, types), rewritten, sensitive)
    for entry in model.opset_import:
        if entry.domain in _STANDARD:
            entry.version = opset
    return dict(sorted(rewritten.items())), sensitive


def _lower_graph(
    graph: onnx.GraphProto,
    index: Graph,
    opset: int,
    before: int,
    known: tuple[dict[str, tuple[int | None, ...]], dict[str, int]],
    rewritten: Counter[str],
    sensitive: list[str],
) -> None:
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    for node in graph.node:
        for inner in inner_graphs(node):
            _lower_graph(inner, index, opset, before, known, rewritten, sensitive)
        emit = Emitter(origin=node, graph=index, opset=opset, shapes=known[0])
        since, equivalent = EQUIVALENTS.get(node.op_type, (0, None))
        if node.op_type == "CastLike":
            _cast_like(emit, known[1])
        elif equivalent is not None and since > opset and _since(node.op_type, before) >= since:
            if known[1].get(node.input[0]) in _NARROW:
                emit = _in_fp32(emit, equivalent, known)
            else:
                equivalent(emit)
        else:
            _keep_or_refuse(emit, before)
            nodes.append(node)
            continue
        rewritten[node.op_type] += 1
        nodes += emit.nodes
        tensors += emit.tensors
        sensitive += emit.sensitive
    replace_nodes(graph, nodes)
    graph.initializer.extend(tensors)


def _in_fp32(
    emit: Emitter, equivalent: Equivalent, known: tuple[dict[str, tuple[int | None, ...]], dict[str, int]]
) -> Emitter:
    """Compute the equivalent of an FP16 node in FP32: its steps overflow where the one operator did not."""
    shapes, types = known
    node, wide = emit.origin, onnx.NodeProto()
    wide.CopyFrom(node)
    inner = Emitter(origin=wide, graph=emit.graph, opset=emit.opset, shapes=shapes)
    for index, name in enumerate(node.input):
        if types.get(name) in _NARROW:
            wide.input[index] = inner("Cast", [name], {"to": onnx.TensorProto.FLOAT})
            if name in shapes:
                shapes[wide.input[index]] = shapes[name]
    kind = types[node.input[0]]
    wide.output[:] = [f"{name}/fp32" if name else "" for name in node.output]
    equivalent(inner)
    for name, wider in zip(node.output, wide.output, strict=True):
        if name:
            inner("Cast", [wider], {"to": kind}, out=name)
    return inner


def _cast_like(emit: Emitter, types: dict[str, int]) -> None:
    """TensorRT 8.5 has no CastLike."""
    node = emit.origin
    kind = types.get(node.input[1])
    if not kind:
        raise emit.refused("the type that it casts to is unknown", "use Cast")
    emit("Cast", [node.input[0]], {"to": kind}, out=node.output[0])


def _keep_or_refuse(emit: Emitter, before: int) -> None:
    """Keep a node whose older definition says the same; drop attributes at their default that it lacks."""
    node = emit.origin
    newer = defs.get_schema(node.op_type, before, "")
    if newer.since_version <= emit.opset:
        return
    try:
        older = defs.get_schema(node.op_type, emit.opset, "")
    except defs.SchemaError:
        raise emit.refused(
            f"it came with opset {_first(node.op_type)} and has no equivalent", "replace it in the model"
        ) from None
    for attribute in list(node.attribute):
        if attribute.name in older.attributes:
            continue
        plain = newer.attributes[attribute.name].default_value
        value = helper.get_attribute_value(attribute)
        default = helper.get_attribute_value(plain) if plain.type else None
        neutral = isinstance(value, list) and set(value) <= {1} and attribute.name == "dilations"
        if value != default and not neutral and not (attribute.name == "saturate"):
            raise emit.refused(f"there is no {attribute.name} yet", "replace it in the model")
        node.attribute.remove(attribute)
    if node.op_type in ("ScatterElements", "ScatterND") and attribute_of(node, "reduction") in ("min", "max"):
        raise emit.refused("there is no reduction by min or max yet", "replace it in the model")
    if sum(1 for name in node.input if name) > older.max_input:
        raise emit.refused("it has more inputs than there were", "replace it in the model")


def _since(op: str, opset: int) -> int:
    try:
        return int(defs.get_schema(op, opset, "").since_version)
    except defs.SchemaError as error:
        raise UserError(f"there is no operator {op} in opset {opset}; export the model again") from error


def _first(op: str) -> int:
    versions: Collection[int] = [s.since_version for s in defs.get_all_schemas_with_history() if s.name == op]
    return min(versions, default=0)


def _give_outputs_shapes(model: onnx.ModelProto) -> None:
    """A model whose output says no shape is not valid, though every runtime takes it."""
    model.graph.ClearField("value_info")
    if any(not value.type.tensor_type.HasField("shape") for value in model.graph.output):
        for value, known in zip(model.graph.output, inferred(model).graph.output, strict=True):
            value.CopyFrom(known)


def _finished(model: onnx.ModelProto) -> onnx.ModelProto:
    """Check what was made: one operator set, types that fit, and no trace of who made it."""
    opset = opset_of(model)
    drop_unused(model.graph)
    strip_traces(model)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    model.ir_version = min(model.ir_version, _IR_VERSION.get(opset, model.ir_version))
    _give_outputs_shapes(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the model is not valid at opset {opset}: {reason}; replace that operator in the model"
        ) from error
    return model
