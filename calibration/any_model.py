"""Any FP32 ONNX file to the INT8 file that pays: what ``edgeglm quantize`` does.

The gate is a share of FP32's score: of a user's metric, else the mean cosine of the first output to FP32's
on samples that no range was found on.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgeglm.bundle.atomic import disk_errors, put_in_place, require_ours, staging_folder
from edgeglm.calibration.conversion import file_by_plan, ranges_from_batches
from edgeglm.calibration.demands import (
    fixed_batch,
    require_computed,
    require_effect,
    require_samples,
    split_batches,
)
from edgeglm.calibration.feeds import Batches, Feeds
from edgeglm.calibration.lane_files import legal_file
from edgeglm.calibration.origin import Origin
from edgeglm.calibration.ort_calls import Ranges
from edgeglm.calibration.outcome import OP_TYPES, Fp16File, Outcome, Settings
from edgeglm.calibration.plan import PrecisionPlan, plan_to_toml, require_fitting
from edgeglm.calibration.precision import checked_feeds, fp16_from_fp32, nothing_quantized
from edgeglm.calibration.preparation import Prepared, prepared_model
from edgeglm.calibration.roofline_gains import roofline_gains
from edgeglm.calibration.schemes import (
    SCHEMES,
    Scheme,
    cpu_schemes,
    scheme_named,
)
from edgeglm.calibration.scoring import Measure, Metric, measure_against
from edgeglm.calibration.search import search_plan
from edgeglm.calibration.search_report import SearchReport, reached_words
from edgeglm.calibration.smooth import smoothed
from edgeglm.calibration.source import source_bytes
from edgeglm.calibration.speed import MIN_GAIN, Clock, Speedup, speedup_over, timed_feeds
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.progress import Progress, QuietProgress
from edgeglm.engines.environment import cpu_flags
from edgeglm.export.plain import require_no_float64, require_standard
from edgeglm.targets.legality import check_lane
from edgeglm.targets.schema import Target

_FEW = 2  # batches that AutoCast looks at: it holds every tensor of all of them
_REPORT_NAME = "report.json"
_WRITTEN = ("model.onnx", "fp16.onnx", "plan.toml")


@dataclass(frozen=True, kw_only=True)
class _Task:
    prepared: Prepared
    seen: Sequence[Feeds]
    held_out: Sequence[Feeds]
    target: Target
    settings: Settings
    measure: Measure
    baseline: float
    speedup: Speedup | None
    progress: Progress

    @property
    def on_cpu(self) -> bool:
        return self.target.kind == "cpu"

    @property
    def least_gain(self) -> float:
        return MIN_GAIN if self.on_cpu else 0.0


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
    origin: Origin | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Search or apply a precision plan and write ``model.onnx``, ``plan.toml`` and ``report.json``.

    For a target that computes in FP16, ``fp16.onnx`` comes with it: the device times both.

    Nothing is written when the gate is unmet; the outcome then says what was tried.

    Args:
        source: Any FP32 ONNX file; never written.
        batches: Calibration samples; the last quarter is kept from the ranges for the cosine.
        out: The folder to write; an earlier one of ours is replaced as a whole, another is refused.
        target: What the file is for. On "cpu" schemes are timed here.
        settings: How.
        metric: Gives a file's score, higher is better; the cosine to FP32 if None.
        metric_name: What reports call it.
        plan: A plan to apply instead of searching.
        origin: Where the samples came from, for the plan and the report.
        clock: Times files on the GPU of this machine, where that is the target's; see
            ``edgeglm.compile.clock``. The roofline orders the plans without; on "cpu" ONNX Runtime is timed.
        progress: Told of each evaluation.

    Raises:
        UserError: The model, the samples or the plan do not fit, or ``out`` holds something else.
        EdgeglmError: A quantizer failed.
    """
    require_free(out, source)
    settings, progress = settings or Settings(), progress or QuietProgress()
    require_computed(target, settings, plan)
    require_samples(batches)
    with tempfile.TemporaryDirectory(prefix="edgeglm-quantize-") as folder:
        prepared = prepared_model(source, op_types=OP_TYPES if plan is not None else settings.op_types)
        if target.kind != "cpu":
            require_standard(prepared.model)
            require_no_float64(prepared.model, source.name)
        if plan is None:
            require_effect(prepared, settings)
        checked_feeds(source, batches)
        if plan is not None:
            require_fitting(plan, prepared.sha256, {n for g in prepared.groups for n in g.nodes})
        seen, held_out = split_batches(batches, fixed=fixed_batch(source))
        if alpha := settings.smooth if plan is None else plan.smooth:
            prepared = smoothed(prepared, seen, alpha)
        measure, baseline = measure_against(
            source,
            held_out,
            metric=metric,
            threads=settings.threads,
            integers=target.kind == "cpu",
        )
        task = _Task(
            prepared=prepared,
            seen=seen,
            held_out=held_out,
            target=target,
            settings=settings,
            measure=measure,
            baseline=baseline,
            speedup=_speedup(prepared, seen, held_out, target, settings, clock, Path(folder)),
            progress=progress,
        )
        ranges, report = _planned(task, plan, Path(folder))
        outcome = Outcome(
            source=source.name,
            source_sha256=prepared.sha256,
            source_bytes=source_bytes(source),
            target=target.name,
            metric=metric_name,
            samples=(_count(seen), _count(held_out)),
            calibration=origin or Origin(),
            search=report,
        )
        return outcome if report.chosen is None else _first_written(task, outcome, ranges, Path(folder), out)


def require_free(out: Path, *inputs: Path) -> None:
    """Raise UserError if ``out`` holds something that ``quantize_onnx`` did not write, or an input."""
    require_ours(out, _REPORT_NAME, _WRITTEN, inputs=inputs)


def schemes_for(target: Target, prepared: Prepared, name: str = "") -> tuple[Scheme, ...]:
    """Return the schemes to try on a target, or the one that is asked for."""
    if name:
        return (scheme_named(name),)
    if target.kind != "cpu":
        return (SCHEMES["tensorrt"],)
    return cpu_schemes(cpu_flags(), convolutions=prepared.has_convolutions)


def _speedup(
    prepared: Prepared,
    seen: Sequence[Feeds],
    held_out: Sequence[Feeds],
    target: Target,
    settings: Settings,
    clock: Clock | None,
    scratch: Path,
) -> Speedup | None:
    """Return what times a file here; None where the target is another machine, or has no FP16 beside it."""
    if target.kind == "cpu":
        return speedup_over(prepared.path, held_out, threads=settings.threads)
    if clock is None:
        return None
    beside = scratch / "beside.onnx"
    try:
        _write_fp16(prepared, beside, seen, target)
    except EdgeglmError:  # whoever asks for the FP16 file is told
        return None
    return clock(beside, timed_feeds(prepared.path, held_out, threads=settings.threads))


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
        speedup=task.speedup,
        methods=methods,
        evaluations=settings.evaluations,
        high_precision="fp32" if task.on_cpu else "fp16",
        smooth=settings.smooth,
        embeddings=settings.embeddings,
        make=_fp8_maker(task, ranges) if settings.scheme == "fp8" else None,
        shipped=None if task.on_cpu else _shipped_maker(task, ranges),
        gains=None if task.on_cpu else roofline_gains(task.prepared, target),
        rank=settings.rank,
        progress=task.progress,
    )
    return ranges, report


def _fp8_maker(task: _Task, ranges: Ranges) -> Callable[[Path, PrecisionPlan], object]:
    return lambda path, plan: file_by_plan(task.prepared, path, plan, ranges, task.seen)


def _shipped_maker(task: _Task, ranges: Ranges) -> Callable[[Path, PrecisionPlan], object]:
    """Return what writes the file that travels to a TensorRT target: FP16 besides INT8, in its lane."""

    def make(path: Path, plan: PrecisionPlan) -> None:
        written = file_by_plan(task.prepared, path, plan, ranges, task.seen)
        legal_file(path, task.target, keep_fp32=written.left_in_fp32)

    return make


def _of_a_plan(task: _Task, plan: PrecisionPlan, ranges: Ranges, scratch: Path) -> SearchReport:
    """Measure a user's plan as it is; the gate holds for it too, and on a CPU it must be faster than FP32."""
    path = scratch / "candidate.onnx"
    _shipped_maker(task, ranges)(path, plan)
    score, _ = task.measure(path)
    kept = score / task.baseline
    gain = None if task.speedup is None else task.speedup(path)
    said = f"the plan keeps {kept:.4f} of FP32"
    passed = False
    if not kept >= task.settings.gate:  # NaN is below too
        said += f", below {task.settings.gate:g}"
    elif gain is not None and gain <= task.least_gain:
        said += f" at {gain:.2f} x its speed: it is not faster than FP32 on this machine"
    else:
        passed = True
    return SearchReport(
        gate=task.settings.gate,
        baseline=task.baseline,
        evaluations=(),
        ranking=(),
        frontier=(),
        chosen=plan if passed else None,
        reason=said,
        beside="fp32" if task.on_cpu else "fp16",
    )


def _first_written(task: _Task, outcome: Outcome, ranges: Ranges, scratch: Path, out: Path) -> Outcome:
    """Write the first of the chosen plans whose very file passes, measured once more."""
    report, made = outcome.search, scratch / "model.onnx"
    for plan in _with_residuals(report):
        said = msgspec.structs.replace(plan, calibration=outcome.calibration.sentence)
        written = file_by_plan(task.prepared, made, said, ranges, task.seen)
        if not written.quantized_nodes:
            raise nothing_quantized(task.prepared.path.name)
        said = msgspec.structs.replace(said, residuals=bool(written.residuals))
        pinned = legal_file(made, task.target, keep_fp32=written.left_in_fp32)
        left = tuple(node for node in said.int8_nodes if node not in written.quantized_nodes)
        done = _judged(task, outcome, said, made)
        done = msgspec.structs.replace(done, left_high=left, fp32_nodes=pinned)
        if done.passed:
            if not report.evaluations:  # a plan that was given tells what it reached before it was edited
                assert done.kept is not None
                assert done.cosine is not None
                summary = reached_words(said.scheme, done.kept, done.cosine, done.speedup, report.beside)
                said = msgspec.structs.replace(said, summary=summary)
                chosen = msgspec.structs.replace(done.search, chosen=said)
                done = msgspec.structs.replace(done, search=chosen)
            if not task.on_cpu:
                done = _with_fp16(task, done, scratch)
            _write(done, said, scratch, out)
            break
    return done


def _with_residuals(report: SearchReport) -> Iterator[PrecisionPlan]:
    """Yield the plans to write, each of a search for TensorRT with residual sums in INT8 first."""
    assert report.chosen is not None
    for plan in (report.chosen, *report.others):
        if plan.scheme == "tensorrt" and report.evaluations:
            yield msgspec.structs.replace(plan, residuals=True)
        yield plan


def _with_fp16(task: _Task, done: Outcome, scratch: Path) -> Outcome:
    """Make the FP16 file that the device times beside the INT8 one, or say why there is none."""
    if not check_lane(task.target, "B").ok:
        reason = f"the builder of {task.target.name} chooses FP16 itself, from the FP32 model"
        return msgspec.structs.replace(done, fp16_left_out=reason)
    made = scratch / "fp16.onnx"
    try:
        _write_fp16(task.prepared, made, task.seen, task.target)
        score, found = task.measure(made)
    except EdgeglmError as error:
        made.unlink(missing_ok=True)
        return msgspec.structs.replace(done, fp16_left_out=str(error))
    file = Fp16File(
        sha256=sha256_file(made),
        size_bytes=made.stat().st_size,
        kept=score / task.baseline,
        cosine=found.mean_cosine,
    )
    return msgspec.structs.replace(done, fp16=file)


def _write_fp16(prepared: Prepared, out: Path, seen: Sequence[Feeds], target: Target) -> None:
    fp16_from_fp32(prepared.path, out, seen[:_FEW])
    legal_file(out, target)


def _judged(task: _Task, outcome: Outcome, plan: PrecisionPlan, made: Path) -> Outcome:
    score, found = task.measure(made)
    kept = score / task.baseline
    speedup, reason = _timed(task, made)
    if not kept >= task.settings.gate:
        reason = f"the final file keeps {kept:.4f} of FP32, below the gate"
    elif speedup is not None and speedup <= task.least_gain:
        reason = f"the final file is {speedup:.2f} x as fast: not faster than FP32 on this machine"
    if reason:
        report = msgspec.structs.replace(outcome.search, chosen=None, reason=reason)
        return msgspec.structs.replace(outcome, search=report, score=score, kept=kept, speedup=speedup)
    return msgspec.structs.replace(
        outcome,
        search=msgspec.structs.replace(outcome.search, chosen=plan),
        sha256=sha256_file(made),
        size_bytes=made.stat().st_size,
        score=score,
        kept=kept,
        cosine=found.mean_cosine,
        speedup=speedup,
    )


def _timed(task: _Task, made: Path) -> tuple[float | None, str]:
    """Return how much faster a file is here, None where nothing times it, and why its builder refuses it."""
    try:
        return None if task.speedup is None else round(task.speedup(made), 3), ""
    except UserError:
        raise
    except EdgeglmError as error:
        return None, str(error)


def _write(done: Outcome, plan: PrecisionPlan, scratch: Path, out: Path) -> None:
    with disk_errors(out), staging_folder(out) as staged:
        new = staged / "new"
        new.mkdir()
        for name in ("model.onnx", *(["fp16.onnx"] if done.fp16 is not None else [])):
            shutil.copyfile(scratch / name, new / name)
        (new / "plan.toml").write_text(plan_to_toml(plan), "utf-8")
        (new / _REPORT_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(done), indent=1) + b"\n")
        put_in_place(new, out)


def _count(batches: Sequence[Feeds]) -> int:
    return sum(len(next(iter(feeds.values()))) for feeds in batches)
