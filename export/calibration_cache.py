"""Calibration caches in TensorRT's text format, for TensorRT 8.5 and the DLA.

Such a cache is what ``trtexec --int8 --calib=FILE`` reads beside an FP32 graph without Q/DQ:

    TRT-8503-EntropyCalibration2
    pixels: 3c010a14

a version and an algorithm, then for each tensor its scale (the largest value / 127) as the eight
hexadecimal digits of a big-endian IEEE 754 single. ONNX Runtime's TensorRT provider reads the same.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from edgeglm.core.errors import UserError
from edgeglm.export.graph import QUANTIZERS, Graph, drop_unused, name_of, rename_readers, replace_nodes
from edgeglm.export.outputs import write_file

HEADER = "TRT-8503-EntropyCalibration2"
_HEADER = re.compile(r"TRT-[0-9]{3,6}-[A-Za-z0-9]+")
_INT8_MAX = 127.0
_LARGEST = 3.4028234663852886e38


@dataclass(frozen=True, kw_only=True)
class CalibrationCache:
    """A cache: its first line, and ``{tensor: scale}`` with scales rounded to single precision."""

    scales: Mapping[str, float]
    header: str = HEADER

    @property
    def ranges(self) -> dict[str, float]:
        """``{tensor: largest absolute value that INT8 holds}``."""
        return {name: scale * _INT8_MAX for name, scale in self.scales.items()}


def cache_from_ranges(ranges: Mapping[str, float], *, header: str = HEADER) -> CalibrationCache:
    """Return the cache for ``{tensor: largest absolute value}``.

    Raises UserError for a range that is negative, not finite or beyond single precision, for a name that
    a line cannot hold, and for a header of another form.
    """
    if not _HEADER.fullmatch(header):
        raise UserError(f"{header!r} is no header of a cache; write one like {HEADER}")
    scales = {}
    for name, largest in ranges.items():
        if not name or name != name.strip() or any(c in name for c in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"):
            raise UserError(f"tensor {name!r} cannot stand in a line of a calibration cache; rename it")
        if not math.isfinite(largest) or largest < 0 or largest / _INT8_MAX > _LARGEST:
            raise UserError(
                f"the range of {name} is {largest}; calibrate with samples that give finite values"
            )
        scales[name] = _single(largest / _INT8_MAX)
    return CalibrationCache(scales=scales, header=header)


def cache_text(cache: CalibrationCache) -> str:
    """Return the text of a cache, tensors in their order."""
    lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in cache.scales.items()]
    return "\n".join([cache.header, *lines, ""])


def cache_from_text(text: str, *, origin: str = "the calibration cache") -> CalibrationCache:
    """Parse a cache. Raises UserError with the line that is wrong."""
    lines = text.split("\n")
    header = lines[0].rstrip("\r")
    if not _HEADER.fullmatch(header):
        raise UserError(
            f"{origin} begins with {header[:60]!r}, not with a line like {HEADER}; calibrate again"
        )
    scales: dict[str, float] = {}
    for number, raw in enumerate(lines[1:], start=2):
        line = raw.rstrip("\r")
        if not line.strip():
            continue
        name, colon, digits = line.rpartition(": ")
        try:
            if not colon or not name or len(digits.strip()) > 8:
                raise ValueError("it is not 'tensor: eight hexadecimal digits'")
            # TensorRT leaves out leading zeros: a tensor that is always 0 has the scale "0".
            scale = struct.unpack(">f", bytes.fromhex(digits.strip().zfill(8)))[0]
        except ValueError as error:
            raise UserError(f"{origin}, line {number}: {error}; calibrate again") from error
        if not math.isfinite(scale) or scale < 0:
            raise UserError(f"{origin}, line {number}: the scale of {name} is {scale}; calibrate again")
        if name in scales:
            raise UserError(f"{origin}, line {number}: {name} is there twice; calibrate again")
        scales[name] = scale
    return CalibrationCache(scales=scales, header=header)


def write_cache(cache: CalibrationCache, path: Path) -> Path:
    """Write a cache as TensorRT does: UTF-8, lines ended by a newline. Raises UserError if it cannot."""
    return write_file(path, cache_text(cache).encode())


def cache_from_file(path: Path) -> CalibrationCache:
    """Read a cache. Raises UserError when it cannot be read or is none."""
    try:
        return cache_from_text(path.read_bytes().decode(), origin=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give a cache that TensorRT wrote") from error


def implicit_from_qdq(model: onnx.ModelProto) -> tuple[onnx.ModelProto, CalibrationCache]:
    """Return the graph without Q/DQ, and the cache with the ranges that they had.

    For builders that choose precision themselves (TensorRT 8.5 with ``--calib``, the DLA), weights come
    back as floats. Scales for each channel of an activation have no place in a cache.

    Raises UserError when the graph holds no Q/DQ, or one that a cache cannot state.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = Graph(plain)
    scales: dict[str, float] = {}
    renamed: dict[str, str] = {}
    added: list[onnx.TensorProto] = []
    removed: list[str] = []
    for node in graph.nodes:
        if node.op_type not in QUANTIZERS:
            continue
        weight = graph.constant(node.output[0])
        if weight is not None:
            if node.op_type == "DequantizeLinear":
                added.append(onnx.numpy_helper.from_array(weight, f"{node.output[0]}_float"))
                renamed[node.output[0]] = added[-1].name
        elif node.op_type == "QuantizeLinear":
            scales[node.input[0]] = _activation_scale(graph, node)
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
        else:
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
        removed.append(node.output[0])
    if not scales:
        raise UserError("the graph quantizes no activation; quantize it first")
    gone = set(removed)
    replace_nodes(plain.graph, (node for node in graph.nodes if not gone & set(node.output)))
    plain.graph.initializer.extend(added)
    rename_readers(plain.graph, renamed)
    _keep_output_names(plain.graph, renamed)
    drop_unused(plain.graph)
    return plain, CalibrationCache(scales=scales)


def _activation_scale(graph: Graph, node: onnx.NodeProto) -> float:
    scale = graph.constant(node.input[1])
    zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if scale is None or scale.size != 1 or (zero is not None and (zero != 0).any()):
        raise UserError(
            f"{name_of(node)} quantizes with several scales or a zero point, which a calibration cache "
            "cannot state; quantize activations per tensor and symmetrically"
        )
    return _single(float(scale.reshape(-1)[0]))


def _keep_output_names(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    extra: Sequence[onnx.NodeProto] = [
        onnx.helper.make_node("Identity", [renamed[value.name]], [value.name], name=f"{value.name}/Identity")
        for value in graph.output
        if value.name in renamed
    ]
    graph.node.extend(extra)


def _single(value: float) -> float:
    """Round to single precision."""
    return float(struct.unpack(">f", struct.pack(">f", value))[0])
