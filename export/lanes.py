"""Whether an ONNX file is what a lane promises, and whether a target parses it.

Lane A is for TensorRT 8.5: opset 13 to 16, FP32 with symmetric INT8 Q/DQ on float weights. Lane B is for
TensorRT 10.3 and later: opset 19 or 20, FP16 with Q/DQ, strongly typed, so that every operator reads tensors
of one type and the builder chooses none.
"""

from __future__ import annotations

import importlib.resources
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.parity import cosine_rows
from edgeglm.export.anonymous import save_deterministic
from edgeglm.export.calibration_cache import implicit_from_qdq, write_cache
from edgeglm.export.emit import types_of
from edgeglm.export.graph import QUANTIZERS, Graph, all_nodes, model_from_file, name_of, opset_of
from edgeglm.export.lowering import Lowered, lane_a, lane_b
from edgeglm.export.outputs import require_other_file
from edgeglm.export.plain import require_no_float64, require_shapes
from edgeglm.targets.legality import check_lane, check_opset
from edgeglm.targets.schema import Lane, Target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OPSETS: dict[Lane, range] = {"A": range(13, 17), "B": range(19, 21)}
_PARSERS: dict[Lane, str] = {"A": "8.5", "B": "10.1"}
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_LANE_A_TYPES = (
    TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL,
)  # fmt: skip
#: What no parser of ONNX files makes a tensor of: DataType of TensorRT has none of them, in any release.
_UNPARSED = (
    TensorProto.STRING, TensorProto.INT16, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
    TensorProto.COMPLEX64, TensorProto.COMPLEX128,
)  # fmt: skip
#: Operators whose inputs are meant to be of several types.
_MIXED = (*QUANTIZERS, "Cast", "CastLike", "Where", "Resize", "Loop", "If", "Scan")


@dataclass(frozen=True, kw_only=True)
class LaneReport:
    """What was checked of one file.

    Attributes:
        lane: "A" or "B".
        problems: What is wrong, one sentence each that names the node; empty for a good file.
        max_abs, min_cosine: Against the model that it was made from; None when none was given.
    """

    lane: Lane
    problems: tuple[str, ...]
    max_abs: float | None = None
    min_cosine: float | None = None


def parsed_operators(lane: Lane) -> frozenset[str]:
    """Return the operators that the oldest parser of a lane takes (onnx-tensorrt's operator tables)."""
    return _operator_tables()[_PARSERS[lane]]


def lane_problems(model: onnx.ModelProto, lane: Lane, target: Target | None = None) -> tuple[str, ...]:
    """Return what keeps a model from a lane, and the lane from a target; empty when nothing does."""
    problems: list[str] = []
    opset, allowed = opset_of(model), _OPSETS[lane]
    if opset not in allowed:
        problems.append(f"it is of opset {opset}, and lane {lane} takes {allowed[0]} to {allowed[-1]}")
    foreign = sorted(e.domain for e in model.opset_import if e.domain not in ("", "ai.onnx"))
    if foreign:
        problems.append(f"it needs the operators of {', '.join(foreign)}")
    taken = parsed_operators(lane)
    problems += [
        f"node {name_of(node)!r}: the parser of TensorRT {_PARSERS[lane]} has no {node.op_type}"
        for node in all_nodes(model.graph)
        if node.op_type not in taken
    ]
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # onnx raises several classes of its own, and protobuf's
        problems.append(f"onnx.checker refuses it: {' '.join(str(error).split())[:200]}")
        return tuple(problems)
    problems += [
        f"{name!r} is {TensorProto.DataType.Name(kind)}, and TensorRT has no such type"
        for name, kind in types_of(model).items()
        if kind in _UNPARSED
    ]
    problems += _quantizer_problems(model, lane)
    problems += _lane_a_types(model) if lane == "A" else _mixed_types(model)
    if target is not None:
        problems += [
            v.reason for v in (check_lane(target, lane), check_opset(target, opset, lane=lane)) if not v.ok
        ]
    return tuple(problems)


def checked_lane(
    path: Path,
    lane: Lane,
    *,
    target: Target | None = None,
    reference: Path | None = None,
    batches: Sequence[Mapping[str, npt.NDArray[Any]]] = (),
    least_cosine: float = 0.9999,
) -> LaneReport:
    """Check a lane's file: by ``onnx.checker``, by the lane's rules, and by ONNX Runtime on the CPU.

    Args:
        path: The file.
        lane: What it should be.
        target: Who should parse it; None for no one in particular.
        reference: What it was made from.
        batches: Inputs that both are run on.
        least_cosine: The least cosine of two rows of an output.

    Raises:
        UserError: The file breaks the lane's rules; every reason is in the message.
        EdgeglmError: It answers otherwise than ``reference``.
    """
    problems = lane_problems(model_from_file(path), lane, target)
    if problems:
        raise UserError(
            f"{path.name} is not of lane {lane}: {'; '.join(problems)}; "
            f"make it with 'edgeglm lower --lane {lane}' or leave that operator out"
        )
    if reference is None or not batches:
        return LaneReport(lane=lane, problems=())
    max_abs, cosine = outputs_apart(path, reference, batches)
    if not cosine >= least_cosine:
        raise EdgeglmError(
            f"{path.name} answers otherwise than {reference.name}: cosine {cosine:.6f}, {least_cosine} is "
            "asked; report it with both files"
        )
    return LaneReport(lane=lane, problems=(), max_abs=max_abs, min_cosine=cosine)


def lane_file(
    path: Path,
    out: Path,
    lane: Lane,
    *,
    target: Target | None = None,
    cache: Path | None = None,
    keep_fp32: Sequence[str] = (),
) -> Lowered:
    """Write the file of a lane, checked; nothing is written when it breaks the lane's rules.

    Args:
        path: Any ONNX file; not changed.
        out: Where the file goes.
        lane: "A" or "B".
        target: Who must take the lane.
        cache: Where a calibration cache goes; the file is then without Q/DQ.
        keep_fp32: Nodes that lane A's builder must not compute in FP16 besides.

    Raises:
        UserError: A node has no equivalent, the target does not take the lane, or ``cache`` was asked of a
            model that quantizes no activation; or a file that is read would be written over.
    """
    require_other_file(out, path)
    if cache is not None:
        require_other_file(cache, path, out)
    model = model_from_file(path)
    require_shapes(model, path.name)
    require_no_float64(model, path.name)
    lowered = lane_a(model, keep_fp32=keep_fp32) if lane == "A" else lane_b(model)
    ranges = None
    if cache is not None:  # of the lowered graph: the cache names the tensors that the builder will see
        plain, ranges = implicit_from_qdq(lowered.model)
        lowered = replace(lowered, model=plain, quantized=0)
    if problems := lane_problems(lowered.model, lane, target):
        raise UserError(
            f"{path.name} cannot be of lane {lane}: {'; '.join(problems)}; choose another lane or operator"
        )
    save_deterministic(lowered.model, out)
    if cache is not None and ranges is not None:
        write_cache(ranges, cache)
    return lowered


def outputs_apart(
    path: Path, reference: Path, batches: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> tuple[float, float]:
    """Return the largest absolute difference and the worst cosine of a row, over all float outputs."""
    worst_abs, worst_cosine = 0.0, 1.0
    with (  # as they are written: integer kernels saturate on a CPU without VNNI
        OnnxRuntimeEngine(path, threads=1, integers=False) as one,
        OnnxRuntimeEngine(reference, threads=1, integers=False) as other,
    ):
        for feeds in batches:
            mine, theirs = one.infer(_as_taken(one, feeds)), other.infer(_as_taken(other, feeds))
            for name in theirs:
                if theirs[name].dtype.kind != "f":
                    continue
                a = np.asarray(mine[name], np.float32).reshape(len(mine[name]), -1)
                b = np.asarray(theirs[name], np.float32).reshape(len(theirs[name]), -1)
                worst_abs = max(worst_abs, float(np.abs(a - b).max(initial=0.0)))
                worst_cosine = min(worst_cosine, float(cosine_rows(a, b).min(initial=1.0)))
    return worst_abs, worst_cosine


def _as_taken(
    engine: OnnxRuntimeEngine, feeds: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Return the feeds in the float type that the engine takes: lane A widens FP16 inputs."""
    kinds = {spec.name: np.dtype(spec.dtype) for spec in engine.inputs}
    return {
        name: value.astype(kinds[name]) if value.dtype.kind == "f" else value
        for name, value in feeds.items()
        if name in kinds
    }


def _quantizer_problems(model: onnx.ModelProto, lane: Lane) -> Iterator[str]:
    graph = Graph(model)
    for node in graph.nodes:
        if node.op_type not in QUANTIZERS:
            continue
        zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is not None and (zero.any() or not _fits(zero.dtype, lane)):
            yield f"node {name_of(node)!r}: TensorRT takes INT8 or FP8 with a zero point of 0 only"
        if lane == "A" and node.op_type == "DequantizeLinear" and node.input[0] in graph.initializers:
            yield f"node {name_of(node)!r}: TensorRT 8.5 takes no INT8 constant"


def _fits(zero_point: np.dtype[Any], lane: Lane) -> bool:
    return zero_point in (np.int8, np.int32) or (lane == "B" and zero_point.name.startswith("float8"))


def _lane_a_types(model: onnx.ModelProto) -> Iterator[str]:
    tensors = [*model.graph.initializer]
    tensors += [a.t for node in all_nodes(model.graph) for a in node.attribute if a.HasField("t")]
    for tensor in tensors:
        if tensor.data_type not in _LANE_A_TYPES:
            yield f"{tensor.name!r} is {TensorProto.DataType.Name(tensor.data_type)}, and lane A is FP32"


def _mixed_types(model: onnx.ModelProto) -> Iterator[str]:
    """Name nodes whose float inputs differ in type, which a strongly typed network refuses."""
    types = types_of(model)
    for node in model.graph.node:
        if node.op_type in _MIXED:
            continue
        kinds = {types[name] for name in node.input if types.get(name) in _FLOATS}
        if len(kinds) > 1:
            words = " and ".join(sorted(TensorProto.DataType.Name(kind) for kind in kinds))
            yield f"node {name_of(node)!r} ({node.op_type}) reads {words}"


@cache
def _operator_tables() -> dict[str, frozenset[str]]:
    text = (importlib.resources.files("edgeglm.export") / "operators.toml").read_text("utf-8")
    return {version: frozenset(table["operators"]) for version, table in tomllib.loads(text).items()}
