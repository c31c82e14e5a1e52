"""The only file that calls ModelOpt: quiet, on a CPU, on scratch copies, with everything it said kept."""

from __future__ import annotations

import io
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from edgeglm.calibration.feeds import batches_of, write_npz
from edgeglm.calibration.source import weight_files
from edgeglm.core.errors import EdgeglmError, UserError

if TYPE_CHECKING:
    import onnx

Feeds = Mapping[str, npt.NDArray[Any]]
_CPU = "cpu"
#: AutoCast's own bound on the values of a node in FP16.
_SAFE_FP16 = 512.0


class FeedReader:
    """ModelOpt's and ONNX Runtime's CalibrationDataReader over batches that stay where they are."""

    def __init__(self, batches: Sequence[Feeds]) -> None:
        self.batches = batches
        self.position = 0

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """Return the next batch, None after the last."""
        if self.position == len(self.batches):
            return None
        self.position += 1
        return dict(self.batches[self.position - 1])

    def get_first(self) -> dict[str, npt.NDArray[Any]]:
        """Return the first batch without moving on."""
        return dict(self.batches[0])

    def rewind(self) -> None:
        """Start again."""
        self.position = 0


def fp16_model(
    path: Path, batches: Sequence[Feeds], *, keep_fp32: Sequence[str] = ()
) -> tuple[onnx.ModelProto, list[str]]:
    """Convert by AutoCast, which keeps in FP32 each node whose values it saw beyond FP16's safe range.

    Inputs and outputs keep their types. Returns the model and what ModelOpt warned of.
    """
    with _scratch_copy(path) as copy, said_by_modelopt() as said:
        import onnx
        from modelopt.onnx.autocast import convert_to_mixed_precision

        tables = _lookup_tables(onnx.load(str(copy)), keep_fp32)
        folder = copy.parent / "feeds"
        folder.mkdir()
        for index, feeds in enumerate(batches):
            write_npz(folder / f"{index:06d}.npz", [feeds], batches_of([feeds]))
        model: onnx.ModelProto = convert_to_mixed_precision(
            str(copy),
            low_precision_type="fp16",
            nodes_to_exclude=[f"{re.escape(name)}$" for name in keep_fp32],
            nodes_to_include=[f"{re.escape(name)}$" for name in tables],
            keep_io_types=True,
            calibration_data=str(folder),
            providers=[_CPU],
        )
    return model, said


def int8_model(
    path: Path,
    batches: Sequence[Feeds],
    *,
    nodes: Sequence[str] | None,
    method: Literal["max", "entropy"],
    high_precision: Literal["fp16", "fp32"],
    per_channel_matmul: bool,
    op_types: Sequence[str] | None = None,
    keep_fp32: Sequence[str] = (),
) -> tuple[onnx.ModelProto, list[str]]:
    """Insert Q/DQ by ModelOpt, at ``nodes``, or by its own rules among ``op_types``.

    With FP16 besides, ``keep_fp32`` stays in FP32. Returns it and the warnings.
    """
    import onnx

    with _scratch_copy(path) as copy, said_by_modelopt() as said, _onnxruntime_restored():
        from modelopt.onnx.quantization import quantize

        out = copy.with_name("quantized.onnx")
        with _matmul_scales(per_column=per_channel_matmul), _left_in_fp32(keep_fp32):
            quantize(
                str(copy),
                quantize_mode="int8",
                calibration_method=method,
                calibration_data_reader=FeedReader(batches),
                calibration_eps=[_CPU],
                nodes_to_quantize=None if nodes is None else [f"{re.escape(name)}$" for name in nodes],
                op_types_to_quantize=None if op_types is None else list(op_types),
                high_precision_dtype=high_precision,
                output_path=str(out),
                log_level="WARNING",
            )
        if not out.is_file():
            raise EdgeglmError("ModelOpt wrote no model; read what it said: " + " | ".join(said[-5:]))
        model = onnx.load(str(out))
    return model, said


def fp8_model(
    path: Path, batches: Sequence[Feeds], *, nodes: Sequence[str], keep_fp32: Sequence[str] = ()
) -> tuple[onnx.ModelProto, list[str]]:
    """Insert FP8 (E4M3) Q/DQ by ModelOpt at ``nodes``; the rest is FP16, but for ``keep_fp32``.

    Returns it and the warnings.

    FP32 besides is no choice here: ONNX Runtime 1.24 takes FP8 Q/DQ in FP32 graphs for INT8 ones and refuses.
    """
    import onnx

    with _scratch_copy(path) as copy, said_by_modelopt() as said, _onnxruntime_restored():
        from modelopt.onnx.quantization import quantize

        out = copy.with_name("quantized.onnx")
        with _left_in_fp32(keep_fp32):
            quantize(
                str(copy),
                quantize_mode="fp8",
                calibration_method="max",
                calibration_data_reader=FeedReader(batches),
                calibration_eps=[_CPU],
                nodes_to_quantize=[f"{re.escape(name)}$" for name in nodes],
                high_precision_dtype="fp16",
                output_path=str(out),
                log_level="WARNING",
            )
        if not out.is_file():
            raise EdgeglmError("ModelOpt wrote no model; read what it said: " + " | ".join(said[-5:]))
        model = onnx.load(str(out))
    return model, said


def _lookup_tables(model: onnx.ModelProto, keep_fp32: Sequence[str]) -> list[str]:
    """Return the Gathers from tables in FP16's range: AutoCast takes token ids for large values."""
    from onnx import TensorProto, numpy_helper

    tables = {
        t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2
    }
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Gather"
        and node.name not in keep_fp32
        and node.input[0] in tables
        and float(np.abs(numpy_helper.to_array(tables[node.input[0]])).max()) <= _SAFE_FP16
    ]


@contextmanager
def said_by_modelopt() -> Iterator[list[str]]:
    """Keep stdout, stderr and the log quiet; yield the list that the warnings are gathered in.

    ModelOpt logs to stdout through handlers of its own, tqdm draws to stderr, and its import warns
    about optional parts.
    """
    said: list[str] = []
    noise = io.StringIO()
    capture = _Capture(said)
    loggers = [logging.getLogger(name) for name in ("modelopt", "modelopt.onnx", "modelopt.onnx.autocast")]
    root = logging.getLogger()
    kept_handlers, kept_level = root.handlers[:], root.level
    with warnings.catch_warnings(record=True) as warned, redirect_stdout(noise), redirect_stderr(noise):
        warnings.simplefilter("always")
        root.handlers = [capture]
        try:
            yield said
        finally:
            root.handlers = kept_handlers
            root.setLevel(kept_level)
            for logger in loggers:
                logger.handlers = [h for h in logger.handlers if not isinstance(h, logging.StreamHandler)]
    said.extend(sorted({str(item.message) for item in warned} - set(said)))


class _Capture(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(level=logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message once."""
        text = record.getMessage()
        if text not in self.said:
            self.said.append(text)


@contextmanager
def _onnxruntime_restored() -> Iterator[None]:
    """Put back what ModelOpt replaces in onnxruntime.quantization: it is never undone otherwise.

    Without this, what ONNX Runtime's quantizers make would depend on whether ModelOpt ran before.
    """
    from onnxruntime.quantization import base_quantizer, calibrate, qdq_quantizer, quantize

    owners: list[Any] = [base_quantizer, calibrate, qdq_quantizer, quantize]
    owners += [thing for owner in owners for thing in vars(owner).values() if isinstance(thing, type)]
    owners = [
        o for o in owners if getattr(o, "__module__", o.__name__).startswith("onnxruntime.quantization")
    ]
    before = [(owner, dict(vars(owner))) for owner in owners]
    try:
        yield
    finally:
        for owner, kept in before:
            for name, value in kept.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


@contextmanager
def _scratch_copy(path: Path) -> Iterator[Path]:
    """Yield a writable copy with its weights in a folder of its own: ModelOpt rewrites what it is given.

    That folder is the working folder meanwhile: shape inference that stops half-way leaves its model and
    weights there, which would be the user's own, or one that cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="edgeglm-modelopt-") as folder:
        copy = Path(folder) / "model.onnx"
        shutil.copyfile(path, copy)
        for beside in weight_files(path):
            if not beside.is_file():
                raise UserError(f"{path.name} keeps weights in {beside.name}; put that file beside it")
            target = Path(folder) / beside.relative_to(path.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(beside, target)
        with chdir(folder):
            yield copy


@contextmanager
def _matmul_scales(*, per_column: bool) -> Iterator[None]:
    """Give MatMul weights a scale for each output column, which ModelOpt 0.47 has no option for.

    It hands ONNX Runtime a table of the ops with per-channel weights that lists Conv alone.
    """
    from modelopt.onnx.quantization import int8

    original = int8.configure_ort

    def configure(*args: Any, **options: Any) -> tuple[dict[str, Any], list[str]]:
        settings, op_types = original(*args, **options)
        settings["QDQOpTypePerChannelSupportToAxis"] |= {"MatMul": 1}
        return settings, op_types

    if per_column:
        int8.configure_ort = configure
    try:
        yield
    finally:
        int8.configure_ort = original


@contextmanager
def _left_in_fp32(names: Sequence[str]) -> Iterator[None]:
    """Keep nodes in FP32 beside Q/DQ, for which ModelOpt 0.47 takes types of operators alone."""
    from modelopt.onnx.autocast.precisionconverter import PrecisionConverter

    original, kept = PrecisionConverter.convert, set(names)

    def convert(self: Any, high: Sequence[str], low: Sequence[str]) -> Any:
        left = [name for name in low if name in kept]
        return original(self, [*high, *left], [name for name in low if name not in kept])

    if kept:
        PrecisionConverter.convert = convert
    try:
        yield
    finally:
        PrecisionConverter.convert = original
