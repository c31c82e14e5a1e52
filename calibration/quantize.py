"""FP32 towers -> the FP16 and INT8 candidates that pass the gate, each measured on its very file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgeglm.calibration.conversion import (
    Prepared,
    file_by_plan,
    prepared_model,
    ranges_from_batches,
    whole_plan,
)
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.ort_calls import Ranges
from edgeglm.calibration.plan import PrecisionPlan
from edgeglm.calibration.policy import Int8Policy, policy_named
from edgeglm.calibration.precision import (
    ConversionReport,
    HighPrecision,
    fidelity,
    fp16_from_fp32,
    int8_from_fp32,
)
from edgeglm.calibration.schemes import Method, scheme_named
from edgeglm.calibration.search import search_plan
from edgeglm.calibration.sets import CalibrationSet
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError, unknown_name
from edgeglm.core.progress import Progress, QuietProgress
from edgeglm.evaluate.parity import Parity

Precision = Literal["fp32", "fp16", "int8"]
TOWERS = ("image", "text")
REPORT_NAME = "variants.json"

Metrics = Mapping[str, Any]
#: Given a variant's name and its files, return the metrics measured on these files.
Evaluate = Callable[[str, Mapping[str, Path]], Metrics]


class QuantizeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How candidates are made.

    Attributes:
        candidates: Variants besides FP32, in the order in which they are tried.
        schemes: Tower -> name of an INT8 scheme that makes its file instead of its policy: on a CPU
            the ones of ONNX Runtime, whose INT8 kernels a Q/DQ file of ModelOpt does not reach.
        methods: How ranges are found under a scheme: tried in turn until the gate passes.
        plans: Tower -> a plan that somebody wrote or a search found; taken as it is.
        search_evaluations: The most files that the search for one tower's plan measures; 0 for none.
        minimum_score: The score that the search must keep.
        policies: Tower -> name of its shipped INT8 policy, where there is no scheme.
        high_precision: What INT8 graphs compute in elsewhere: "fp16" for TensorRT (on every SM),
            "fp32" for ONNX Runtime on a CPU, where FP16 is slow.
        fp16_samples: Samples that AutoCast looks at; it holds every tensor of all of them.
        held_out: Calibration samples kept out of the ranges, for the cosine of each file.
    """

    candidates: tuple[Literal["fp16", "int8"], ...] = ("fp16", "int8")
    schemes: dict[str, str] = {}
    methods: tuple[Method, ...] = ("max",)
    plans: dict[str, PrecisionPlan] = {}
    search_evaluations: int = 0
    minimum_score: float = 0.99
    policies: dict[str, str] = msgspec.field(
        default_factory=lambda: {"image": "linear-and-conv", "text": "expanding"}
    )
    high_precision: HighPrecision = "fp16"
    fp16_samples: int = 16
    held_out: int = 16


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a variant may be packed, its score (higher is better) and why."""

    passed: bool
    score: float
    reason: str


#: Given the metrics of a variant and of FP32, decide.
Judge = Callable[[Metrics, Metrics], Verdict]


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One evaluation of a pair of files: per-tower precision, metrics of these files, the verdict."""

    precisions: dict[str, Precision]
    sha256: dict[str, str]
    metrics: dict[str, Any]
    verdict: Verdict


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A variant that travels: ``models/<name>/<tower>.onnx``."""

    name: str
    precisions: dict[str, Precision]
    sha256: dict[str, str]
    size_bytes: dict[str, int]
    metrics: dict[str, Any]
    fidelity: dict[str, Parity]
    conversions: dict[str, ConversionReport]


class QuantizeReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``variants.json``: what travels, what was left out and why, and every evaluation made."""

    variants: dict[str, Variant]
    left_out: dict[str, str]
    trials: dict[str, list[Trial]]


@dataclass(frozen=True, kw_only=True)
class _Converted:
    path: Path
    precision: Precision
    report: ConversionReport | None
    fidelity: Parity


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What one run of :func:`make_candidates` carries from step to step."""

    fp32_dir: Path
    out_dir: Path
    scratch: Path
    calibration: CalibrationSet
    evaluate: Evaluate
    judge: Judge
    config: QuantizeConfig
    baseline: Metrics
    progress: Progress
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    ready: dict[str, tuple[Prepared, Ranges]] = field(default_factory=dict)


_Found = tuple[dict[str, _Converted], Trial]


def make_candidates(
    fp32_dir: Path,
    out_dir: Path,
    calibration: CalibrationSet,
    *,
    evaluate: Evaluate,
    judge: Judge,
    config: QuantizeConfig | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write ``out_dir/<variant>/<tower>.onnx`` for FP32 and each candidate that passes, and the report.

    Where the configuration lets it search, the most harmful groups of a tower return to high precision.
    When INT8 of both towers fails, each tower is tried in INT8 beside the other in high precision. The
    best that passes becomes "int8", with the precision of each tower stated. What passes in no form is
    left out, and the report says why.

    Args:
        fp32_dir: Holds ``image.onnx`` and ``text.onnx``; not changed.
        out_dir: Made if absent.
        calibration: Drawn from training samples.
        evaluate: Measures the task on two files.
        judge: Compares with FP32; see ``edgeglm.evaluate.gates``.
        config: How candidates are made.
        progress: Told of each conversion and evaluation.

    Raises:
        UserError: A tower or its calibration part is absent, or a policy is unknown.
        EdgeglmError: A conversion failed.
    """
    config, progress = config or QuantizeConfig(), progress or QuietProgress()
    for tower in TOWERS:
        if not (fp32_dir / f"{tower}.onnx").is_file():
            raise UserError(f"no {tower}.onnx in {fp32_dir}; export both towers first")
        if tower not in calibration.record.towers:
            raise unknown_name("calibration tower", tower, calibration.record.towers)
        if tower not in config.policies:
            raise UserError(f"no INT8 policy for {tower}; name one under policies")
        policy_named(config.policies[tower])
    scratch = out_dir / ".scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with progress.task("Quantizing", total=None) as task:
            task.note("evaluating fp32")
            fp32 = {t: _fp32_tower(t, fp32_dir, calibration) for t in TOWERS}
            baseline = evaluate("fp32", {tower: made.path for tower, made in fp32.items()})
            work = _Work(
                fp32_dir=fp32_dir,
                out_dir=out_dir,
                scratch=scratch,
                calibration=calibration,
                evaluate=evaluate,
                judge=judge,
                config=config,
                baseline=baseline,
                progress=progress,
            )
            variants = {"fp32": _keep(work, "fp32", fp32, baseline)}
            left_out: dict[str, str] = {}
            for name in config.candidates:
                task.note(f"converting to {name}")
                found = _fp16(work) if name == "fp16" else _int8(work)
                task.advance()
                if found is None:
                    left_out[name] = _reasons(work.trials[name])
                else:
                    made, trial = found
                    variants[name] = _keep(work, name, made, trial.metrics)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report = QuantizeReport(variants=variants, left_out=left_out, trials=work.trials)
    _write_report(out_dir / REPORT_NAME, report)
    return report


def _fp16(work: _Work) -> _Found | None:
    made = {tower: _fp16_tower(work, tower) for tower in TOWERS}
    trial = _try(work, "fp16", made)
    return (made, trial) if trial.verdict.passed else None


def _int8(work: _Work) -> _Found | None:
    """Both towers in INT8, else the better mix with high precision.

    High precision is FP16 where the target computes in it, and FP32 on a CPU, where FP16 is slow.
    """
    tried = []
    for method in work.config.methods if any(_is_open(work, tower) for tower in TOWERS) else ("max",):
        int8 = {tower: _tower_by_method(work, tower, method) for tower in TOWERS}
        trial = _try(work, "int8", int8)
        if trial.verdict.passed:
            return int8, trial
        tried.append((trial.verdict.score, int8))
    int8 = max(tried, key=lambda found: found[0])[1]
    high = {tower: _high_tower(work, tower) for tower in TOWERS}
    mixes = [{**high, tower: int8[tower]} for tower in TOWERS]
    passing = [found for mix in mixes if (found := (mix, _try(work, "int8", mix)))[1].verdict.passed]
    return max(passing, key=lambda found: found[1].verdict.score, default=None)


def _reasons(trials: Sequence[Trial]) -> str:
    return "; ".join(f"{_label(trial.precisions)}: {trial.verdict.reason}" for trial in trials)


def _try(work: _Work, name: str, made: Mapping[str, _Converted]) -> Trial:
    metrics = dict(work.evaluate(name, {tower: tower_made.path for tower, tower_made in made.items()}))
    trial = Trial(
        precisions={tower: tower_made.precision for tower, tower_made in made.items()},
        sha256={tower: sha256_file(tower_made.path) for tower, tower_made in made.items()},
        metrics=metrics,
        verdict=work.judge(metrics, work.baseline),
    )
    work.trials.setdefault(name, []).append(trial)
    return trial


def _fp32_tower(tower: str, fp32_dir: Path, calibration: CalibrationSet) -> _Converted:
    path = fp32_dir / f"{tower}.onnx"
    same = fidelity(path, path, calibration.batches(tower)[:1])
    return _Converted(path=path, precision="fp32", report=None, fidelity=same)


def _fp16_tower(work: _Work, tower: str) -> _Converted:
    out = work.scratch / f"{tower}-fp16.onnx"
    record = work.scratch / f"{tower}-fp16.json"
    if record.is_file():  # already made for the FP16 candidate
        report = msgspec.json.decode(record.read_bytes(), type=ConversionReport)
    else:
        few = work.calibration.batches(tower, work.config.fp16_samples)
        report = fp16_from_fp32(work.fp32_dir / f"{tower}.onnx", out, few)
        record.write_bytes(msgspec.json.encode(report))
    return _measured(work, tower, out, "fp16", report)


def _high_tower(work: _Work, tower: str) -> _Converted:
    if work.config.high_precision == "fp16":
        return _fp16_tower(work, tower)
    return _fp32_tower(tower, work.fp32_dir, work.calibration)


def _is_open(work: _Work, tower: str) -> bool:
    """Whether another method may give another file."""
    scheme = work.config.schemes.get(tower, "")
    fixed = tower in work.config.plans or work.config.search_evaluations
    return bool(scheme) and not fixed and scheme_named(scheme).activation != "dynamic"


def _tower_by_method(work: _Work, tower: str, method: Method) -> _Converted:
    """Return a tower in INT8: by its plan, by a searched one, by its scheme, else by its policy."""
    config = work.config
    scheme = config.schemes.get(tower, "")
    if tower not in config.plans and not scheme and not config.search_evaluations:
        return _int8_tower(work, tower, _policy(work, tower))
    seen, _ = _split(work, tower)
    if tower not in work.ready:
        prepared = prepared_model(work.fp32_dir / f"{tower}.onnx")
        methods = tuple(dict.fromkeys((*config.methods, *_methods(config.plans.get(tower)))))
        work.ready[tower] = prepared, ranges_from_batches(prepared, seen, methods)
    prepared, ranges = work.ready[tower]
    plan = config.plans.get(tower)
    if plan is None and config.search_evaluations:
        plan = _searched(work, tower, scheme or "tensorrt", prepared, ranges)
    if plan is None:
        plan = whole_plan(prepared, scheme or "tensorrt", method, config.high_precision)
    out = work.scratch / f"{tower}-{plan.scheme}-{method}.onnx"
    report = file_by_plan(prepared, out, plan, ranges, seen)
    return _measured(work, tower, out, "int8", report)


def _methods(plan: PrecisionPlan | None) -> tuple[Method, ...]:
    return () if plan is None else tuple(plan.int8_nodes.values())


def _searched(
    work: _Work, tower: str, scheme: str, prepared: Prepared, ranges: Ranges
) -> PrecisionPlan | None:
    """Search a plan on the task's metric, the other tower in FP32; None if none is found."""
    config = work.config
    _, held_out = _split(work, tower)
    fp32 = {name: work.fp32_dir / f"{name}.onnx" for name in TOWERS}
    if (done := work.scratch / f"{tower}-plan.json").is_file():
        return msgspec.json.decode(done.read_bytes(), type=PrecisionPlan)

    def measure(path: Path) -> tuple[float, Parity]:
        metrics = work.evaluate("int8", {**fp32, tower: path})
        return work.judge(metrics, work.baseline).score, fidelity(path, fp32[tower], held_out)

    report = search_plan(
        prepared,
        ranges,
        (scheme_named(scheme),),
        measure=measure,
        baseline=1.0,
        gate=config.minimum_score,
        scratch=work.scratch,
        methods=config.methods,
        evaluations=config.search_evaluations,
        high_precision=config.high_precision,
        progress=work.progress,
    )
    if report.chosen is not None:
        done.write_bytes(msgspec.json.encode(report.chosen))
    return report.chosen


def _int8_tower(work: _Work, tower: str, policy: Int8Policy) -> _Converted:
    out = work.scratch / f"{tower}-int8.onnx"
    seen, _ = _split(work, tower)
    report = int8_from_fp32(
        work.fp32_dir / f"{tower}.onnx",
        out,
        seen,
        policy=policy,
        high_precision=work.config.high_precision,
    )
    return _measured(work, tower, out, "int8", report)


def _policy(work: _Work, tower: str) -> Int8Policy:
    return policy_named(work.config.policies[tower])


def _split(work: _Work, tower: str) -> tuple[Batches, Batches]:
    """Return the batches that ranges are found on, and those that the cosine is measured on."""
    batches = work.calibration.batches(tower)
    held = max(1, min(len(batches) // 2, -(-work.config.held_out // work.calibration.record.batch_size)))
    return (batches[:-held], batches[-held:]) if len(batches) > 1 else (batches, batches)


def _measured(
    work: _Work, tower: str, path: Path, precision: Precision, report: ConversionReport
) -> _Converted:
    _, held_out = _split(work, tower)
    measured = fidelity(path, work.fp32_dir / f"{tower}.onnx", held_out)
    return _Converted(path=path, precision=precision, report=report, fidelity=measured)


def _keep(work: _Work, name: str, made: Mapping[str, _Converted], metrics: Metrics) -> Variant:
    folder = work.out_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    for tower, tower_made in made.items():
        shutil.copyfile(tower_made.path, folder / f"{tower}.onnx")
    return Variant(
        name=name,
        precisions={tower: tower_made.precision for tower, tower_made in made.items()},
        sha256={tower: sha256_file(folder / f"{tower}.onnx") for tower in made},
        size_bytes={tower: (folder / f"{tower}.onnx").stat().st_size for tower in made},
        metrics=dict(metrics),
        fidelity={tower: tower_made.fidelity for tower, tower_made in made.items()},
        conversions={tower: m.report for tower, m in made.items() if m.report is not None},
    )


def _label(precisions: Mapping[str, str]) -> str:
    return " + ".join(f"{tower} {precision}" for tower, precision in sorted(precisions.items()))


def _write_report(path: Path, report: QuantizeReport) -> None:
    path.write_text(json.dumps(msgspec.to_builtins(report), indent=1, sort_keys=True) + "\n")
