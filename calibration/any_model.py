"""Any FP32 ONNX file to the INT8 file that pays: what ``edgeglm quantize`` does.

The gate is a share of FP32's score: of a user's metric, else the mean cosine of the first output to FP32's
on samples that no range was found on.
"""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.bundle.atomic import disk_errors, put_in_place, staging_folder
from edgeglm.calibration.conversion import (
    Prepared,
    file_by_plan,
    prepared_model,
    ranges_from_batches,
)
from edgeglm.calibration.feeds import Batches, Feeds
from edgeglm.calibration.ort_calls import Ranges
from edgeglm.calibration.plan import Embeddings, PrecisionPlan, plan_to_toml, require_fitting
from edgeglm.calibration.precision import checked_feeds
from edgeglm.calibration.schemes import (
    SCHEMES,
    Method,
    Scheme,
    cpu_schemes,
    scheme_named,
)
from edgeglm.calibration.search import SearchReport, search_plan
from edgeglm.calibration.smooth import smoothed
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.progress import Progress, QuietProgress
from edgeglm.engines.environment import cpu_flags
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.timing import compare_latency
from edgeglm.evaluate.parity import Parity, parity
from edgeglm.targets.legality import require_precision
from edgeglm.targets.schema import Target

Metric = Callable[[Path], float]
_ROUNDS = 9
_HELD_OUT_SHARE = 4  # one batch of this many is kept from the ranges
MIN_SAMPLES = 2


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is quantized.

    Attributes:
        gate: The least share of FP32's score.
        evaluations: The most files that the search measures.
        methods: How ranges may be found.
        scheme: One scheme's name, or "" for all that the target may like.
        threads: Threads inside an operator, for timing too.
        smooth: SmoothQuant's alpha for what MatMuls read; 0 for none.
        embeddings: Weight-only precision of embedding tables.
    """

    gate: float = 0.99
    evaluations: int = 40
    methods: tuple[Method, ...] = ("max", "percentile", "entropy", "mse")
    scheme: str = ""
    threads: int = 1
    smooth: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    embeddings: Embeddings = "high"


class Outcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``report.json``: what was searched and what was written.

    Attributes:
        source, source_sha256: The FP32 file's name and digest.
        target: Its name.
        metric: "cosine", or the user's function.
        samples: How many samples ranges were found on, and how many measured cosines.
        search: All evaluations, the ranking and the plan. With a user's plan there is only that one.
        sha256, size_bytes: Of ``model.onnx``; "" and 0 when nothing was written.
        score, kept, cosine: Of ``model.onnx`` itself, measured once more.
        speedup: Over FP32 here; None where the target is another machine.
    """

    source: str
    source_sha256: str
    target: str
    metric: str
    samples: tuple[int, int]
    search: SearchReport
    sha256: str = ""
    size_bytes: int = 0
    source_bytes: int = 0
    score: float | None = None
    kept: float | None = None
    cosine: float | None = None
    speedup: float | None = None

    @property
    def passed(self) -> bool:
        """Whether a model was written."""
        return bool(self.sha256)


@dataclass(frozen=True, kw_only=True)
class _Task:
    prepared: Prepared
    seen: Sequence[Feeds]
    held_out: Sequence[Feeds]
    target: Target
    settings: Settings
    measure: Callable[[Path], tuple[float, Parity]]
    baseline: float
    progress: Progress

    @property
    def on_cpu(self) -> bool:
        return self.target.kind == "cpu"


def quantize_onnx(
    source: Path,
    batches: Batches,
    out: Path,
    *,
    target: Target,
    settings: Settings | None = None,
    metric: Metric | None = None,
    metric_name: str = "cosine",
    plan: PrecisionPlan | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Search or apply a precision plan and write ``model.onnx``, ``plan.toml`` and ``report.json``.

    Nothing is written when the gate is unmet; the outcome then says what was tried.

    Args:
        source: Any FP32 ONNX file; never written.
        batches: Calibration samples; the last quarter is kept from the ranges for the cosine.
        out: The folder to write; replaced as a whole.
        target: What the file is for. On "cpu" schemes are timed here.
        settings: How.
        metric: Gives a file's score, higher is better; the cosine to FP32 if None.
        metric_name: What reports call it.
        plan: A plan to apply instead of searching.
        progress: Told of each evaluation.

    Raises:
        UserError: The model, the samples or the plan do not fit.
        EdgeglmError: A quantizer failed.
    """
    settings, progress = settings or Settings(), progress or QuietProgress()
    float8 = (settings.scheme if plan is None else plan.scheme) == "fp8"
    require_precision(target, "fp8" if float8 else "int8")
    if batches.samples < MIN_SAMPLES:
        raise UserError(f"{batches.samples} calibration samples; give at least {MIN_SAMPLES}, better 64")
    with tempfile.TemporaryDirectory(prefix="edgeglm-quantize-") as folder:
        prepared = prepared_model(source)
        checked_feeds(source, batches)
        if plan is not None:
            require_fitting(plan, prepared.sha256, {n for g in prepared.groups for n in g.nodes})
        seen, held_out = split_batches(batches)
        if alpha := settings.smooth if plan is None else plan.smooth:
            prepared = smoothed(prepared, seen, alpha)
        reference = _outputs(source, held_out, settings.threads)

        def measure(path: Path) -> tuple[float, Parity]:
            found = parity(_outputs(path, held_out, settings.threads), reference)
            return (found.mean_cosine if metric is None else _score(metric, path)), found

        task = _Task(
            prepared=prepared,
            seen=seen,
            held_out=held_out,
            target=target,
            settings=settings,
            measure=measure,
            baseline=1.0 if metric is None else _score(metric, source),
            progress=progress,
        )
        ranges, report = _planned(task, plan, Path(folder))
        outcome = Outcome(
            source=source.name,
            source_sha256=prepared.sha256,
            source_bytes=source.stat().st_size,
            target=target.name,
            metric=metric_name,
            samples=(_count(seen), _count(held_out)),
            search=report,
        )
        if report.chosen is None:
            return outcome
        made = Path(folder) / "model.onnx"
        for plan in (report.chosen, *report.others):
            file_by_plan(prepared, made, plan, ranges, task.seen)
            done = _written(task, outcome, plan, made, out)
            if done.passed:
                break
        return done


def split_batches(batches: Batches) -> tuple[Sequence[Feeds], Sequence[Feeds]]:
    """Return batches to find ranges on, and batches that only cosines are measured on."""
    if len(batches) == 1:  # too few for two batches: the rows are shared out
        half = max(1, batches.samples // 2)
        head = Batches(batches.arrays, half, start=batches.start, stop=batches.start + half)
        rest = Batches(batches.arrays, half, start=batches.start + half, stop=batches.stop)
        return head, rest
    held = max(1, len(batches) // _HELD_OUT_SHARE)
    return batches[:-held], batches[-held:]


def metric_from_name(name: str) -> Metric:
    """Return the function of ``module:function``, looked for in the working folder too.

    It is called with the path of an ONNX file and returns a number, higher is better. Raises UserError.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"{name!r} names no metric; write it as module:function")
    working = str(Path.cwd())
    sys.path.insert(0, working)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"cannot import {module_name} ({error}); run from its folder, or install it"
        ) from error
    finally:
        sys.path.remove(working)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{module_name} has no function {function_name!r}; define it: path -> number")
    return function  # type: ignore[no-any-return]


def schemes_for(target: Target, prepared: Prepared, name: str = "") -> tuple[Scheme, ...]:
    """Return the schemes to try on a target, or the one that is asked for."""
    if name:
        return (scheme_named(name),)
    if target.kind != "cpu":
        return (SCHEMES["tensorrt"],)
    return cpu_schemes(cpu_flags(), convolutions=prepared.has_convolutions)


def speedup_over(
    source: Path, batches: Sequence[Feeds], *, threads: int, rounds: int = _ROUNDS
) -> Callable[[Path], float]:
    """Return a function that times a file beside FP32, interleaved: the lesser of batch 1 and a whole one."""
    whole = dict(batches[0])
    feeds = [whole]
    with OnnxRuntimeEngine(source, threads=threads, spinning=False) as engine:
        if all(not isinstance(spec.shape[0], int) for spec in engine.inputs if spec.shape):
            feeds.insert(0, {name: array[:1] for name, array in whole.items()})

    def measured(path: Path) -> float:
        ratios = []
        with (
            OnnxRuntimeEngine(source, threads=threads, spinning=False) as fp32,
            OnnxRuntimeEngine(path, threads=threads, spinning=False) as other,
        ):
            for batch in feeds:
                found = compare_latency({"fp32": (fp32, batch), "other": (other, batch)}, rounds=rounds)
                ratios.append(found["fp32"].median_ms / found["other"].median_ms)
        return min(ratios)

    return measured


def _planned(task: _Task, plan: PrecisionPlan | None, scratch: Path) -> tuple[Ranges, SearchReport]:
    settings, target = task.settings, task.target
    if plan is not None:
        methods = tuple(dict.fromkeys(plan.int8_nodes.values()))
        schemes: tuple[Scheme, ...] = (scheme_named(plan.scheme),)
    else:
        methods = settings.methods
        schemes = schemes_for(target, task.prepared, settings.scheme)
    static = any(scheme.activation in ("uint8", "int8") for scheme in schemes)
    ranges: Ranges = {}
    if static:
        ranges = ranges_from_batches(
            task.prepared, task.seen, methods, threads=settings.threads, progress=task.progress
        )
    if plan is not None:
        return ranges, _of_a_plan(task, plan, ranges, scratch)
    report = search_plan(
        task.prepared,
        ranges,
        schemes,
        measure=task.measure,
        baseline=task.baseline,
        gate=settings.gate,
        scratch=scratch,
        speedup=speedup_over(task.prepared.path, task.held_out, threads=settings.threads)
        if task.on_cpu
        else None,
        methods=methods,
        evaluations=settings.evaluations,
        high_precision="fp32" if task.on_cpu else "fp16",
        smooth=settings.smooth,
        embeddings=settings.embeddings,
        make=_fp8_maker(task, ranges) if settings.scheme == "fp8" else None,
        progress=task.progress,
    )
    return ranges, report


def _fp8_maker(task: _Task, ranges: Ranges) -> Callable[[Path, PrecisionPlan], object]:
    return lambda path, plan: file_by_plan(task.prepared, path, plan, ranges, task.seen)


def _of_a_plan(task: _Task, plan: PrecisionPlan, ranges: Ranges, scratch: Path) -> SearchReport:
    """Measure a user's plan as it is; the gate holds for it too."""
    path = scratch / "candidate.onnx"
    file_by_plan(task.prepared, path, plan, ranges, task.seen)
    score, _ = task.measure(path)
    kept = score / task.baseline
    passed = kept >= task.settings.gate
    said = f"the plan keeps {kept:.4f} of FP32"
    return SearchReport(
        gate=task.settings.gate,
        baseline=task.baseline,
        evaluations=(),
        ranking=(),
        frontier=(),
        chosen=plan if passed else None,
        reason=said if passed else f"{said}, below {task.settings.gate:g}",
    )


def _written(task: _Task, outcome: Outcome, plan: PrecisionPlan, made: Path, out: Path) -> Outcome:
    """Measure the very file and write it, unless it is below the gate after all."""
    score, found = task.measure(made)
    kept = score / task.baseline
    if kept < task.settings.gate:
        report = msgspec.structs.replace(
            outcome.search, chosen=None, reason=f"the final file keeps {kept:.4f} of FP32, below the gate"
        )
        return msgspec.structs.replace(outcome, search=report, score=score, kept=kept)
    speedup = None
    if task.on_cpu:
        timed = speedup_over(task.prepared.path, task.held_out, threads=task.settings.threads)
        speedup = round(timed(made), 3)
    done = msgspec.structs.replace(
        outcome,
        search=msgspec.structs.replace(outcome.search, chosen=plan),
        sha256=sha256_file(made),
        size_bytes=made.stat().st_size,
        score=score,
        kept=kept,
        cosine=found.mean_cosine,
        speedup=speedup,
    )
    with disk_errors(out), staging_folder(out) as staged:
        new = staged / "new"
        new.mkdir()
        shutil.copyfile(made, new / "model.onnx")
        (new / "plan.toml").write_text(plan_to_toml(plan), "utf-8")
        (new / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(done), indent=1) + b"\n")
        put_in_place(new, out)
    return done


def _outputs(path: Path, batches: Sequence[Feeds], threads: int) -> npt.NDArray[np.float32]:
    """Return the first float output over all batches, float32 [n, ...]."""
    with OnnxRuntimeEngine(path, threads=threads, spinning=False) as engine:
        floats = [spec.name for spec in engine.outputs if spec.dtype.startswith("float")]
        if not floats:
            raise UserError(f"{path.name} has no float output to compare; give --metric module:function")
        return np.concatenate([np.asarray(engine.infer(feeds)[floats[0]], np.float32) for feeds in batches])


def _score(metric: Metric, path: Path) -> float:
    try:
        value = float(metric(path))
    except EdgeglmError:
        raise
    except Exception as error:  # a user's code raises anything
        raise UserError(
            f"the metric failed on {path.name}: {type(error).__name__}: {error}; mend it"
        ) from error
    if not math.isfinite(value):
        raise UserError(f"the metric gave {value} for {path.name}; return a finite number, higher is better")
    return value


def _count(batches: Sequence[Feeds]) -> int:
    return sum(len(next(iter(feeds.values()))) for feeds in batches)
