"""What would overflow if a graph were cast to FP16, found before the cast, and made safe.

FP16 ends at 65504 and begins at 6e-8. A plain cast breaks where a graph squares (a LayerNorm or RMSNorm
written out), where it adds a mask of -1e9 (which becomes infinite, and 0 * inf is NaN), where a residual
stream or a sum grows large, and where an epsilon becomes 0. Patterns tell the first, values measured on
samples the others. A LayerNorm is made one operator, which sums up in FP32; a mask is clamped; everything
else is named, to be kept in FP32.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edgeglm.core.errors import UserError
from edgeglm.export.anonymous import save_deterministic
from edgeglm.export.fp16_findings import FP16_MAX, Finding, float_constants, judged, reaches_softmax
from edgeglm.export.graph import Graph, model_from_file, named, opset_of, unquantized
from edgeglm.export.lowering import lane_b
from edgeglm.export.outputs import require_other_file
from edgeglm.export.patterns import is_large_negative
from edgeglm.export.ranges import Range, measured_ranges
from edgeglm.export.rewrites import fuse_layer_norms, rewrite

#: BERT's own mask: exp(-1e4) is 0 in every precision.
MASK = -1e4


class Fp16Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was found in a file, and what was done about it.

    Attributes:
        findings: In the graph as it was given, in its order.
        fused: LayerNorms that became one operator.
        clamped: Mask constants that were raised to -1e4.
        keep_fp32: Nodes of the file at ``path`` that must compute in FP32.
        changed: Whether a new file was written.
        path: The file to convert: the new one, or the given one when nothing had to change.
    """

    findings: tuple[Finding, ...]
    fused: tuple[str, ...] = ()
    clamped: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    changed: bool = False
    path: str = ""


def lint_fp16(model: onnx.ModelProto, ranges: Mapping[str, Range] | None = None) -> tuple[Finding, ...]:
    """Return what an FP16 cast of ``model`` breaks, in the order of the graph.

    Args:
        model: An FP32 model, its nodes named.
        ranges: What :func:`~edgeglm.export.ranges.measured_ranges` saw; without it only patterns and
            constants are looked at.

    Raises UserError when the model is quantized already.
    """
    unquantized(model)
    return tuple(finding for finding, _ in judged(model, ranges))


def fp16_ready(path: Path, out: Path, batches: Iterable[Mapping[str, npt.NDArray[Any]]]) -> Fp16Report:
    """Find what overflows in FP16 and write a file that can be cast, with the nodes to keep in FP32.

    Args:
        path: FP32 model; not changed.
        out: Where the mended model goes, if anything has to change. It answers as ``path`` does, but that
            rows which a mask hides whole are no longer equal.
        batches: A few samples, run one batch at a time.

    Raises UserError when the file or the samples cannot be used, or the model is quantized already.
    """
    samples = list(batches)
    model = model_from_file(path)
    unquantized(model)
    unnamed = any(not node.name for node in model.graph.node)
    named(model)
    found = judged(model, measured_ranges(model, samples))
    findings = tuple(finding for finding, _ in found)
    fused, clamped = _mended(model, findings)
    if fused or clamped:
        found = judged(model, measured_ranges(model, samples))
    asked = {name for finding, nodes in found if finding.remedy != "clamp" for name in nodes}
    keep = tuple(node.name for node in model.graph.node if node.name in asked)
    changed = bool(fused or clamped or (unnamed and keep))
    if changed:
        save_deterministic(model, out)
    return Fp16Report(
        findings=findings,
        fused=tuple(fused),
        clamped=tuple(clamped),
        keep_fp32=keep,
        changed=changed,
        path=str(out if changed else path),
    )


def lint_file(path: Path, *, data: Path | None = None, output: Path | None = None) -> Fp16Report:
    """Lint an ONNX file, on the samples of an ``.npz`` if there is one, and mend it if ``output`` is given.

    Raises UserError for a file or samples that cannot be used, or an output that would be written over them.
    """
    if output is not None:
        require_other_file(output, path, *([] if data is None else [data]))
    samples = [] if data is None else _in_batches(_samples(data), model_from_file(path))
    if output is not None:
        if data is None:
            raise UserError("what to keep in FP32 is seen on samples only; give them with --data")
        report = fp16_ready(path, output, samples)
        if not report.changed:
            save_deterministic(model_from_file(path), output)
        return msgspec.structs.replace(report, path=str(output))
    model = model_from_file(path)
    named(model)
    findings = lint_fp16(model, measured_ranges(model, samples) if samples else None)
    return Fp16Report(findings=findings, path=str(path))


def _samples(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the samples {path}: {error}; write them with numpy.savez") from error
    # ONNX Runtime takes every array to be in this machine's order of bytes
    return {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}


def _in_batches(
    samples: dict[str, npt.NDArray[Any]], model: onnx.ModelProto
) -> list[dict[str, npt.NDArray[Any]]]:
    """Cut samples into whole batches of the size that a model is bound to; one batch for any other model."""
    shapes = [value.type.tensor_type.shape.dim for value in Graph(model).inputs]
    size = max((dims[0].dim_value for dims in shapes if dims), default=0)
    rows = min((len(array) for array in samples.values() if array.ndim), default=0)
    if not size or rows < size:
        return [samples]
    starts = range(0, rows - size + 1, size)
    return [{name: array[at : at + size] for name, array in samples.items()} for at in starts]


def _mended(model: onnx.ModelProto, findings: Sequence[Finding]) -> tuple[list[str], list[str]]:
    """Fuse and clamp, in place."""
    fused: list[str] = []
    if any(finding.kind == "decomposed-layer-norm" for finding in findings):
        if opset_of(model) < 17:
            model.CopyFrom(lane_b(model).model)
        fused = rewrite(model, (fuse_layer_norms,)).made.get("layer-norm", [])
    return fused, _clamp(model) if any(f.kind == "softmax-mask" for f in findings) else []


def _clamp(model: onnx.ModelProto) -> list[str]:
    """Clamp mask constants, in place, to -1e4. Returns their names."""
    graph = Graph(model)
    masks = [
        name
        for name, value in float_constants(graph)
        if is_large_negative(value, FP16_MAX) and reaches_softmax(graph, name)
    ]
    for tensor in model.graph.initializer:
        if tensor.name in masks:
            tensor.CopyFrom(_clamped(tensor))
    for node in model.graph.node:
        if node.output and node.output[0] in masks:
            for attribute in node.attribute:
                if attribute.name == "value":
                    attribute.t.CopyFrom(_clamped(attribute.t))
                elif attribute.name == "value_float":
                    attribute.f = float(np.clip(attribute.f, MASK, -MASK))
                elif attribute.name == "value_floats":
                    attribute.floats[:] = np.clip(attribute.floats, MASK, -MASK).tolist()
    return masks


def _clamped(tensor: onnx.TensorProto) -> onnx.TensorProto:
    value = numpy_helper.to_array(tensor)
    return numpy_helper.from_array(np.clip(value, MASK, -MASK).astype(value.dtype), tensor.name)
