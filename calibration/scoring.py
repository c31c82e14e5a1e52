"""The score of a file: a user's metric, or how close its first output is to FP32's."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeglm.calibration.feeds import Feeds
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.parity import Parity, parity
from edgeglm.export.graph import model_from_file
from edgeglm.export.ort_fusion import has_fp8

#: Given the path of an ONNX file, a number, higher is better.
Metric = Callable[[Path], float]
#: Given a file, its score and its parity with FP32.
Measure = Callable[[Path], tuple[float, Parity]]


def metric_from_name(name: str) -> Metric:
    """Return the function of ``module:function``, looked for in the working folder too.

    It is called with the path of an ONNX file and returns a number, higher is better. What it imports when
    it is called is looked for there as well. Raises UserError.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"{name!r} names no metric; write it as module:function")
    working = str(Path.cwd())
    try:
        with _importable(working):
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"cannot import {module_name} ({error}); run from its folder, or install it"
        ) from error
    except Exception as error:  # a user's code raises anything
        raise UserError(
            f"{module_name} fails when it is imported ({type(error).__name__}: {error}); mend it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{module_name} has no function {function_name!r}; define it: path -> number")

    def metric(path: Path) -> float:
        with _importable(working):
            return function(path)  # type: ignore[no-any-return]

    return metric


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have changed the path
            sys.path.remove(folder)


def measure_against(
    source: Path, held_out: Sequence[Feeds], *, metric: Metric | None, threads: int, integers: bool = True
) -> tuple[Measure, float]:
    """Return what measures a file, and FP32's own score.

    Without a metric the score is the mean cosine of the first output to FP32's on ``held_out``. Without
    ``integers`` Q/DQ are computed as they are written, as TensorRT's sums are exact; ONNX Runtime's kernels
    saturate on a CPU without VNNI.

    Raises:
        UserError: The model has no float output, or NaN in it, or the metric fails on FP32.
    """
    any_kind = metric is not None
    reference = first_outputs(source, held_out, threads, any_kind=any_kind)
    if not np.isfinite(reference).all():
        raise UserError(
            f"{source.name} itself gives NaN or infinity on the samples, so nothing can be held against it; "
            "mend the model, or leave those samples out"
        )
    if metric is None and reference.size == 1:
        raise UserError(
            f"{source.name} gives one number, whose cosine says nothing; give --metric, or more samples"
        )

    def measure(path: Path) -> tuple[float, Parity]:
        found = parity(
            first_outputs(path, held_out, threads, integers=integers, any_kind=any_kind), reference
        )
        return (found.mean_cosine if metric is None else score_of(metric, path)), found

    return measure, 1.0 if metric is None else baseline_of(metric, source)


def baseline_of(metric: Metric, source: Path) -> float:
    """Return FP32's own score. Raises UserError unless a share of it can be taken."""
    if (value := score_of(metric, source)) <= 0:
        raise UserError(
            f"the metric gives FP32 {value:g}, and the gate is a share of that; "
            "return a number above 0, higher is better"
        )
    return value


def first_outputs(
    path: Path, batches: Sequence[Feeds], threads: int, *, integers: bool = True, any_kind: bool = False
) -> npt.NDArray[np.float32]:
    """Return the first float output over all batches, float32 [n, ...]. Raises UserError without one.

    With ``any_kind`` the first output stands in for it, such as the classes that a detector names.

    Single numbers become one row, as the cosine of a number to another is 1 or -1.
    """
    with OnnxRuntimeEngine(path, threads=threads, spinning=False, integers=integers) as engine:
        floats = [spec.name for spec in engine.outputs if spec.dtype.startswith("float")]
        if not floats and any_kind:
            floats = [engine.outputs[0].name]
        if not floats:
            raise UserError(f"{path.name} has no float output to compare; give --metric module:function")
        found = [np.asarray(engine.infer(feeds)[floats[0]], np.float32) for feeds in batches]
    rows = np.concatenate([np.atleast_1d(array) for array in found])
    return rows.reshape(1, -1) if rows.size == len(rows) else rows


def score_of(metric: Metric, path: Path) -> float:
    """Return a user's metric of a file. Raises UserError when it fails or is not finite."""
    try:
        value = float(metric(path))
    except EdgeglmError:
        raise
    except Exception as error:  # a user's code raises anything
        raise UserError(
            f"the metric failed on {path.name}: {type(error).__name__}: {error}; {_mending(path)}"
        ) from error
    if not math.isfinite(value):
        raise UserError(f"the metric gave {value} for {path.name}; return a finite number, higher is better")
    return value


def _mending(path: Path) -> str:
    """Say what to do about a metric that failed on a file: ONNX Runtime cannot optimize FP8 transformers."""
    if not has_fp8(model_from_file(path)):
        return "mend it"
    return (
        "ONNX Runtime cannot move its Q/DQ about in an FP8 file, so that the metric has to open it with "
        "SessionOptions().add_session_config_entry('session.disable_quant_qdq', '1')"
    )
