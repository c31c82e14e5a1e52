"""FP32 towers -> the FP16 and INT8 candidates that pass the gate, each measured on its very file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgeglm.calibration.policy import policy_named
from edgeglm.calibration.sets import CalibrationSet
from edgeglm.calibration.speed import Clock
from edgeglm.calibration.towers import TowerFile, TowerFiles
from edgeglm.calibration.variants import (
    REPORT_NAME,
    TOWERS,
    Evaluate,
    Judge,
    Metrics,
    QuantizeConfig,
    QuantizeReport,
    Trial,
    Tune,
    Variant,
    Verdict,
)
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError, unknown_name
from edgeglm.core.progress import Progress, QuietProgress


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What one run of :func:`make_candidates` carries from step to step."""

    files: TowerFiles
    out_dir: Path
    evaluate: Evaluate
    judge: Judge
    config: QuantizeConfig
    baseline: Metrics
    tune: Tune | None = None
    trials: dict[str, list[Trial]] = field(default_factory=dict)


_Found = tuple[dict[str, TowerFile], Trial]


def make_candidates(
    fp32_dir: Path,
    out_dir: Path,
    calibration: CalibrationSet,
    *,
    evaluate: Evaluate,
    judge: Judge,
    config: QuantizeConfig | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
    tune: Tune | None = None,
) -> QuantizeReport:
    """Write ``out_dir/<variant>/<tower>.onnx`` for FP32 and each candidate that passes, and the report.

    For TensorRT, INT8 is tried with residual sums in INT8 too, then without. When INT8 of both towers fails,
    each is tried in INT8 beside the other in high precision. The one that costs more is then tuned for it,
    and the other too where that does not suffice, held against the same FP32 ones; then, if the configuration
    lets it search, the most harmful groups of each return to high precision. When that fails too, the better
    of the towers alone in INT8 becomes "int8", if it passes. The precision of each tower is stated. What
    passes in no form is left out, and the report says why.

    Args:
        fp32_dir: Holds ``image.onnx`` and ``text.onnx``; not changed.
        out_dir: Made if absent.
        calibration: Drawn from training samples.
        evaluate: Measures the task on two files.
        judge: Compares with FP32; see ``edgeglm.evaluate.gates``.
        config: How candidates are made.
        clock: Times the plans of a search for TensorRT, where this machine has the target's GPU.
        progress: Told of each conversion and evaluation.
        tune: Makes the tuned towers, where that can be done; not asked where a plan is given.

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
            files = TowerFiles(
                fp32_dir=fp32_dir,
                scratch=scratch,
                calibration=calibration,
                config=config,
                progress=progress,
                clock=clock,
            )
            fp32 = {tower: files.fp32(tower) for tower in TOWERS}
            baseline = evaluate("fp32", {tower: made.path for tower, made in fp32.items()})
            work = _Work(
                files=files,
                out_dir=out_dir,
                evaluate=evaluate,
                judge=judge,
                config=config,
                baseline=baseline,
                tune=tune,
            )
            variants = {"fp32": _keep(work, "fp32", fp32, baseline)}
            left_out: dict[str, str] = {}
            seconds: dict[str, float] = {}
            for name in config.candidates:
                task.note(f"converting to {name}")
                started = time.perf_counter()
                found = _fp16(work) if name == "fp16" else _int8(work)
                seconds[name] = round(time.perf_counter() - started, 3)
                task.advance()
                if found is None:
                    left_out[name] = _reasons(work.trials[name])
                else:
                    made, trial = found
                    kept = _keep(work, name, made, trial.metrics)
                    variants[name] = msgspec.structs.replace(kept, tuned=trial.tuned)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report = QuantizeReport(
        variants=variants,
        left_out=left_out,
        trials=work.trials,
        speedups=files.speedups,
        seconds=seconds,
        searches=files.searches,
    )
    _write_report(out_dir / REPORT_NAME, report)
    return report


def _fp16(work: _Work) -> _Found | None:
    made = {tower: work.files.fp16(tower) for tower in TOWERS}
    trial = _try(work, "fp16", made)
    return (made, trial) if trial.verdict.passed else None


def _int8(work: _Work) -> _Found | None:
    """Both towers whole in INT8, else both by a searched plan, else the better mix with high precision."""
    files = work.files
    paying = [tower for tower in TOWERS if files.pays(tower)]
    if not paying:
        _slower(work)
        return None
    high = {tower: files.high(tower) for tower in TOWERS}
    tried = []
    for int8 in _wholes(files, high, paying):
        trial = _try(work, "int8", int8)
        if trial.verdict.passed:
            return int8, trial
        tried.append((trial.verdict.score, int8))
    int8 = max(tried, key=lambda found: found[0])[1]
    mixes = [{**high, tower: int8[tower]} for tower in paying] if len(paying) > 1 else []
    alone = [(mix, _try(work, "int8", mix)) for mix in mixes]
    worst_first = paying
    if alone:
        scores = {tower: trial.verdict.score for tower, (_, trial) in zip(paying, alone, strict=True)}
        worst_first = sorted(paying, key=scores.__getitem__)
    if (tuned := _tuned(work, worst_first)) is not None:
        return tuned
    if work.config.search_evaluations:
        searched = _searched(work, paying)
        if searched:
            planned = {tower: int8[tower] for tower in paying if tower in work.config.plans}
            made = {**high, **planned, **searched}
            trial = _try(work, "int8", made)
            if trial.verdict.passed:
                return made, trial
    passing = [found for found in alone if found[1].verdict.passed]
    return max(passing, key=lambda found: found[1].verdict.score, default=None)


def _wholes(
    files: TowerFiles, high: Mapping[str, TowerFile], paying: Sequence[str]
) -> Iterator[dict[str, TowerFile]]:
    """Yield the towers that pay whole in INT8, by each method, or for TensorRT by where residuals are INT8.

    A residual sum whose other side is quantized costs no kernel of its own there. The sums of both towers
    come first, then those of the image tower alone, whose values have fewer outliers, then none.
    """
    methods = files.config.methods if any(files.is_open(tower) for tower in TOWERS) else ("max",)
    choice = [tower for tower in paying if files.has_residual_choice(tower)]
    seen: set[tuple[str, ...]] = set()
    for residuals in dict.fromkeys((tuple(choice), tuple(t for t in choice if t == "image"), ())):
        for method in methods:
            made = {tower: files.int8(tower, method, residuals=tower in residuals) for tower in paying}
            digests = tuple(sha256_file(file.path) for file in made.values())
            if digests not in seen:
                seen.add(digests)
                yield {**high, **made}


def _tuned(work: _Work, paying: Sequence[str]) -> _Found | None:
    """All that pay whole in INT8, one tower after another trained to bear it until the gate passes."""
    if work.tune is None or work.config.plans:
        return None
    weights = work.files.fp32_dir
    for tower in paying:
        folder = work.files.scratch / f"tuned-{tower}"
        folder.mkdir()
        for kept in TOWERS:
            shutil.copyfile(weights / f"{kept}.onnx", folder / f"{kept}.onnx")
        work.tune(folder, tower)
        weights, files = folder, work.files.of_weights(folder)
        rest = {tower: files.high(tower) for tower in TOWERS if tower not in paying}
        for made in _wholes(files, rest, paying):
            trial = _try(work, "int8", made, tuned=True)
            if trial.verdict.passed:
                return made, trial
    return None


def _slower(work: _Work) -> None:
    """Record what INT8 would keep, and that it is not faster than FP32 here."""
    trial = _try(work, "int8", {tower: work.files.int8(tower, "max") for tower in TOWERS})
    times = ", ".join(
        f"{tower} {scheme} {gain:.2f} x"
        for tower, timed in sorted(work.files.speedups.items())
        for scheme, gain in sorted(timed.items())
    )
    reason = f"no INT8 scheme is faster than FP32 on this machine ({times})"
    verdict = Verdict(passed=False, score=trial.verdict.score, reason=reason)
    work.trials["int8"][-1] = msgspec.structs.replace(trial, verdict=verdict)


def _searched(work: _Work, towers: Sequence[str]) -> dict[str, TowerFile]:
    """Return the towers by plans that cost each its part of what both may lose; none for one without."""

    def score(paths: Mapping[str, Path]) -> float:
        return work.judge(work.evaluate("int8", paths), work.baseline).score

    part = 1 - (1 - work.config.minimum_score) / len(towers)
    plans = {
        tower: work.files.searched(tower, score, part) for tower in towers if tower not in work.config.plans
    }
    return {tower: work.files.by_plan(tower, plan) for tower, plan in plans.items() if plan is not None}


def _reasons(trials: Sequence[Trial]) -> str:
    return "; ".join(
        f"{_label(trial)}{' tuned' if trial.tuned else ''}: {trial.verdict.reason}" for trial in trials
    )


def _try(work: _Work, name: str, made: Mapping[str, TowerFile], *, tuned: bool = False) -> Trial:
    metrics = dict(work.evaluate(name, {tower: tower_made.path for tower, tower_made in made.items()}))
    trial = Trial(
        precisions={tower: tower_made.precision for tower, tower_made in made.items()},
        sha256={tower: sha256_file(tower_made.path) for tower, tower_made in made.items()},
        metrics=metrics,
        verdict=work.judge(metrics, work.baseline),
        tuned=tuned,
        residuals=tuple(
            tower for tower, file in made.items() if file.report is not None and file.report.residuals
        ),
    )
    work.trials.setdefault(name, []).append(trial)
    return trial


def _keep(work: _Work, name: str, made: Mapping[str, TowerFile], metrics: Metrics) -> Variant:
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


def _label(trial: Trial) -> str:
    return " + ".join(
        f"{tower} {precision}{' with residuals' if tower in trial.residuals else ''}"
        for tower, precision in sorted(trial.precisions.items())
    )


def _write_report(path: Path, report: QuantizeReport) -> None:
    path.write_text(json.dumps(msgspec.to_builtins(report), indent=1, sort_keys=True) + "\n")
