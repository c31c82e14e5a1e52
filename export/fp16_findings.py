"""The places of a graph that FP16 breaks: by pattern, by constant, and by value seen on samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edgeglm.export.graph import Graph, all_nodes, attribute_of, inner_graphs, name_of
from edgeglm.export.patterns import Match, is_large_negative, norms
from edgeglm.export.ranges import Range

FP16_MAX = 65504.0
#: Samples show not every value: a tensor that comes this near is taken for one that overflows.
SAFE_MAX = FP16_MAX / 2
FP16_LEAST = 2.0**-24

FindingKind = Literal[
    "decomposed-layer-norm", "decomposed-rms-norm", "softmax-mask", "large-constant", "large-values",
    "large-sum", "vanishing-epsilon", "not-finite", "inner-graph",
]  # fmt: skip
Remedy = Literal["fuse", "clamp", "keep-fp32", "mend-model"]

_CARRY = (
    "Add", "Sub", "Mul", "Where", "Min", "Max", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Cast",
    "Transpose", "Slice", "Concat", "Identity", "Gather", "Tile", "ScatterND", "Trilu",
)  # fmt: skip
#: What leaves values as they are, or makes integers and truths.
_HARMLESS = (
    "Identity", "Constant", "ConstantOfShape", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose",
    "Slice", "Split", "Concat", "Gather", "Expand", "Tile", "Cast", "Shape", "Size", "Range", "Equal",
    "Greater", "Less", "And", "Or", "Not",
)  # fmt: skip
_SQUARE_SUMS = ("LpNormalization", "InstanceNormalization", "GroupNormalization")
_LOG_SUMS = ("ReduceLogSum", "ReduceLogSumExp")
_MEANS = ("ReduceMean", "GlobalAveragePool", "AveragePool")
_EXPONENT_MAX = 700.0  # exp of more is beyond FP64


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One place that FP16 breaks, or may break.

    Attributes:
        kind: Of what it is.
        node: The node that computes or reads it.
        why: One sentence with the number.
        largest: The largest value seen or stored there; None where no sample was run.
        remedy: What :func:`fp16_ready` does; "mend-model" is for a person, as FP32 is broken already.
        certain: Whether a number beyond FP16 was seen; else the pattern alone tells.
    """

    kind: FindingKind
    node: str
    why: str
    largest: float | None
    remedy: Remedy
    certain: bool


def judged(
    model: onnx.ModelProto, ranges: Mapping[str, Range] | None
) -> list[tuple[Finding, tuple[str, ...]]]:
    """Return findings with the nodes that FP32 would save, in the order of the graph."""
    graph = Graph(model)
    found = [
        *_norm_findings(graph, ranges),
        *_constant_findings(graph),
        *_inner_findings(graph),
        *(_measured_findings(graph, ranges) if ranges else ()),
        *(_broken_findings(graph, ranges) if ranges else ()),
    ]
    order = {name_of(node): index for index, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda pair: order.get(pair[0].node, -1))


def _norm_findings(
    graph: Graph, ranges: Mapping[str, Range] | None
) -> Iterator[tuple[Finding, tuple[str, ...]]]:
    for match in norms(graph):
        if not match.decomposed:
            continue
        square = match.parts["square"]
        largest = _largest(ranges, square.output[0])
        layer = match.kind == "layer-norm"
        seen = "" if largest is None else f"; its largest square here is {largest:.4g}"
        nodes = tuple(name_of(node) for node in match.nodes)
        finding = Finding(
            kind="decomposed-layer-norm" if layer else "decomposed-rms-norm",
            node=name_of(square),
            why=f"it squares before it takes a mean, and 256 squared is beyond FP16{seen}",
            largest=largest,
            remedy="fuse" if layer else "keep-fp32",
            certain=largest is not None and largest > FP16_MAX,
        )
        yield finding, _steps(match) or nodes


def _steps(match: Match) -> tuple[str, ...]:
    """Return the nodes of a normalization up to its division: scale and bias are harmless."""
    names = [name_of(node) for node in match.nodes]
    tail = sum(1 for role in ("scale", "bias") if match.tensors.get(role))
    return tuple(names[: len(names) - tail])


def _constant_findings(graph: Graph) -> Iterator[tuple[Finding, tuple[str, ...]]]:
    for name, value in float_constants(graph):
        finite = np.abs(value[np.isfinite(value)])
        largest = float(finite.max(initial=0.0))
        readers = graph.true_readers(name)
        if largest > FP16_MAX and readers:
            mask = is_large_negative(value, FP16_MAX) and reaches_softmax(graph, name)
            yield (
                Finding(
                    kind="softmax-mask" if mask else "large-constant",
                    node=name_of(readers[0]),
                    why=f"the constant {name} holds {largest:.4g}, and FP16 ends at {FP16_MAX:.0f}",
                    largest=largest,
                    remedy="clamp" if mask else "keep-fp32",
                    certain=True,
                ),
                tuple(name_of(node) for node in readers),
            )
        elif value.size == 1 and 0 < largest < FP16_LEAST:
            guarded = [node for node in readers if _guards(graph, node)]
            if guarded:
                yield (
                    Finding(
                        kind="vanishing-epsilon",
                        node=name_of(guarded[0]),
                        why=f"{name} is {largest:.2g}, which is 0 in FP16 and keeps no divisor from 0",
                        largest=largest,
                        remedy="keep-fp32",
                        certain=True,
                    ),
                    tuple(name for node in guarded for name in _guarded_division(graph, node)),
                )


def _inner_findings(graph: Graph) -> Iterator[tuple[Finding, tuple[str, ...]]]:
    """Name what holds a graph of its own that computes: patterns and samples tell of the main graph alone."""
    for node in graph.nodes:
        steps = [step for inner in inner_graphs(node) for step in all_nodes(inner)]
        if computing := [step for step in steps if step.op_type not in _HARMLESS]:
            finding = Finding(
                kind="inner-graph",
                node=name_of(node),
                why=f"{node.op_type} computes in a graph of its own, where {name_of(computing[0])} "
                f"({computing[0].op_type}) and {len(computing) - 1} more are not looked at",
                largest=None,
                remedy="keep-fp32",
                certain=False,
            )
            yield finding, (name_of(node),)


def float_constants(graph: Graph) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the float constants of a graph with their values."""
    for name, tensor in graph.initializers.items():
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            yield name, numpy_helper.to_array(tensor)
    for node in graph.nodes:
        if node.op_type == "Constant":
            value = graph.constant(node.output[0])
        elif node.op_type == "ConstantOfShape":
            stored = attribute_of(node, "value")
            value = None if stored is None else numpy_helper.to_array(stored)
        else:
            continue
        if value is not None and value.dtype in (np.float32, np.float64):
            yield node.output[0], value


def _measured_findings(
    graph: Graph, ranges: Mapping[str, Range]
) -> Iterator[tuple[Finding, tuple[str, ...]]]:
    written_out = [match for match in norms(graph) if match.decomposed]
    steps = {name for match in written_out for name in _steps(match)}  # a scale behind them may be too large
    squares = {node.output[0] for match in written_out for node in match.nodes if name_of(node) in steps}
    masked = _behind_masks(graph)
    for name, seen in ranges.items():
        maker = graph.made_by.get(name)
        largest = seen.largest
        readers = [name_of(node) for node in graph.readers.get(name, ())]
        if largest > SAFE_MAX and name not in squares and name not in masked:
            at = name_of(maker) if maker is not None else readers[0] if readers else name
            yield (
                Finding(
                    kind="large-values",
                    node=at,
                    why=f"{name} reaches {largest:.4g} on the samples, and FP16 ends at {FP16_MAX:.0f}",
                    largest=largest,
                    remedy="keep-fp32",
                    certain=largest > FP16_MAX,
                ),
                (*((name_of(maker),) if maker is not None else ()), *readers),
            )
        elif maker is not None and name not in squares:
            inner = _inner_sum(maker, ranges)
            if inner > SAFE_MAX:
                yield (
                    Finding(
                        kind="large-sum",
                        node=name_of(maker),
                        why=f"{maker.op_type} adds up to {inner:.4g} inside before it gives {largest:.4g}",
                        largest=inner,
                        remedy="keep-fp32",
                        certain=inner > FP16_MAX,
                    ),
                    (name_of(maker),),
                )


def _broken_findings(graph: Graph, ranges: Mapping[str, Range]) -> Iterator[tuple[Finding, tuple[str, ...]]]:
    """Name where NaN or infinity begins in FP32; infinity that masks a softmax is meant."""
    for name, seen in ranges.items():
        maker = graph.made_by.get(name)
        before = [ranges[side] for side in (maker.input if maker is not None else ()) if side in ranges]
        if seen.finite or any(not side.finite for side in before):
            continue
        if not seen.nan and reaches_softmax(graph, name):
            continue
        finding = Finding(
            kind="not-finite",
            node=name if maker is None else name_of(maker),
            why=f"{name} holds {'NaN' if seen.nan else 'infinity'} on the samples, in FP32 already",
            largest=None,
            remedy="mend-model",
            certain=True,
        )
        yield finding, ()


def _inner_sum(node: onnx.NodeProto, ranges: Mapping[str, Range]) -> float:
    """Return the largest number inside a reduction: before its root or logarithm, or before it is divided."""
    before, after = ranges.get(node.input[0] if node.input else ""), ranges[node.output[0]]
    if node.op_type == "ReduceL2":
        return after.largest**2
    if node.op_type in _LOG_SUMS:
        return math.exp(min(max(after.high, 0.0), _EXPONENT_MAX))
    if before is None:
        return 0.0
    if node.op_type in _SQUARE_SUMS:
        return before.largest**2
    if node.op_type in _MEANS:
        return after.largest * before.elements / max(1, after.elements)
    return 0.0


def reaches_softmax(graph: Graph, name: str) -> bool:
    """Say whether a value flows into a softmax by sums and choices alone, as a mask does."""
    return _flow(graph, name)[1]


def _behind_masks(graph: Graph) -> set[str]:
    """Return the tensors that are large because a mask constant is in them: clamping that mends them."""
    found: set[str] = set()
    for name, value in float_constants(graph):
        if is_large_negative(value, FP16_MAX):
            tensors, softmax = _flow(graph, name)
            found |= tensors if softmax else set()
    return found


def _flow(graph: Graph, name: str) -> tuple[set[str], bool]:
    waiting, seen, softmax = [name], {name}, False
    while waiting:
        for node in graph.readers.get(waiting.pop(), ()):
            softmax = softmax or node.op_type in ("Softmax", "LogSoftmax")
            fresh = set(node.output) - seen if node.op_type in _CARRY else set()
            seen |= fresh
            waiting += fresh
    return seen, softmax


def _guards(graph: Graph, node: onnx.NodeProto) -> bool:
    """Say whether a node keeps a divisor from 0."""
    return node.op_type in ("Add", "Clip", "Max") and bool(_guarded_division(graph, node))


def _guarded_division(graph: Graph, node: onnx.NodeProto) -> tuple[str, ...]:
    """Return the nodes from a guard to the division by it, none when it guards no division."""
    path = [node]
    for _ in range(4):
        for reader in graph.true_readers(path[-1].output[0]):
            if _divides(graph, reader, path[-1].output[0]):
                return tuple(name_of(step) for step in (*path, reader))
        onward = [n for n in graph.true_readers(path[-1].output[0]) if n.op_type in ("Sqrt", "Expand", "Pow")]
        if not onward:
            return ()
        path.append(onward[0])
    return ()


def _divides(graph: Graph, node: onnx.NodeProto, name: str) -> bool:
    """Say whether a node divides by a tensor, be it as a power of -1/2."""
    if node.op_type == "Pow":
        return (graph.scalar(node.input[1]) or 0.0) < 0
    return node.op_type in ("Div", "Reciprocal") and graph.source(node.input[-1]) == graph.source(name)


def _largest(ranges: Mapping[str, Range] | None, name: str) -> float | None:
    if ranges is None or name not in ranges:
        return None
    return ranges[name].largest
