"""What each method gives on real models: ranges, bits, smoothing, biases, tables, FP8; and both towers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from quantization_bias import bias_corrected
from quantization_models import Subject, as_written, newest

from edgeglm.build.quantize_stage import METHODS, calibration_candidates
from edgeglm.build.tower_scores import TowerScores
from edgeglm.calibration.conversion import file_by_plan, int8_by_plan, ranges_from_batches, whole_plan
from edgeglm.calibration.curve import curve_of_sizes
from edgeglm.calibration.plan import PrecisionPlan
from edgeglm.calibration.precision import fidelity
from edgeglm.calibration.preparation import Prepared, prepared_model
from edgeglm.calibration.quantize import make_candidates
from edgeglm.calibration.schemes import METHODS as RANGES
from edgeglm.calibration.schemes import cpu_schemes, x86_sums_16_bits
from edgeglm.calibration.sets import calibration_set_from_arrays
from edgeglm.calibration.smooth import smoothed
from edgeglm.calibration.variants import QuantizeConfig
from edgeglm.compile.contract import tower_profile
from edgeglm.compile.worker import BuildRequest, engine_built_apart
from edgeglm.core.errors import EdgeglmError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.store import Store
from edgeglm.data.pairs import PairSet
from edgeglm.engines.environment import cpu_flags
from edgeglm.targets.schema import load_target

SIZES = (4, 8, 16, 32, 64, 96)
_FP8_TARGETS = ("l4", "rtx-pro-6000")
_SUBJECTS = ("student image", "student text", "MiniLM-L6")


def method_rows(subject: Subject, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what is kept by each method, everything else alike: the whole model, the same samples."""
    if subject.name not in _SUBJECTS:
        return
    prepared = prepared_model(subject.path)
    baseline = subject.score(subject.path) if subject.score else 1.0
    suffix = "-reduced" if x86_sums_16_bits(cpu_flags()) else ""
    base = ("u8s8-chains" if prepared.has_convolutions else "u8s8") + suffix
    ranges = ranges_from_batches(prepared, subject.calibration, RANGES)

    def row(what: str, scheme: str, make: Callable[[Path], object]) -> dict[str, Any]:
        path = folder / "method.onnx"
        make(path)
        found = fidelity(path, subject.path, subject.held_out)
        kept = subject.score(path) / baseline if subject.score else found.mean_cosine
        return {
            "what": what,
            "scheme": scheme,
            "kept": round(kept, 4),
            "mean_cosine": round(found.mean_cosine, 5),
            "megabytes": round(path.stat().st_size / 1e6, 1),
        }

    def by_plan(
        plan: PrecisionPlan, of: Prepared = prepared, found: Any = ranges
    ) -> Callable[[Path], object]:
        return lambda path: int8_by_plan(of, path, plan, found)

    for method in RANGES:
        yield row(f"ranges: {method}", base, by_plan(whole_plan(prepared, base, method)))
    wide = base.removesuffix("-reduced")
    for scheme in dict.fromkeys((wide, f"{wide}-reduced", "s8s8", "s8s8-reduced")):
        yield row("weights and activations", scheme, by_plan(whole_plan(prepared, scheme)))
    if not prepared.has_convolutions:
        for scheme in ("dynamic", "dynamic-reduced"):
            yield row("weights and activations", scheme, by_plan(whole_plan(prepared, scheme)))
        for tables in ("int8", "int4"):
            plan = msgspec.structs.replace(whole_plan(prepared, f"dynamic{suffix}"), embeddings=tables)
            yield row(f"embedding tables: {tables}", plan.scheme, by_plan(plan))
        for alpha in (0.3, 0.5):
            made = smoothed(prepared, subject.calibration, alpha)
            found = ranges_from_batches(made, subject.calibration, ("max",))
            for scheme in (base, f"dynamic{suffix}"):
                yield row(
                    f"SmoothQuant, alpha {alpha}", scheme, by_plan(whole_plan(made, scheme), made, found)
                )
    for one_by_one, words in ((False, "all at once"), (True, "layer by layer")):
        plan = whole_plan(prepared, base)
        made = bias_corrected(prepared, plan, ranges, subject.calibration, one_by_one=one_by_one)
        yield row(f"bias correction, {words}", base, by_plan(plan, made))
    yield fp8_row(subject, prepared, folder, row)


def fp8_row(
    subject: Subject, prepared: Prepared, folder: Path, row: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Return what FP8 by ModelOpt keeps in ONNX Runtime, and which GPUs TensorRT-RTX builds it for."""
    plan = whole_plan(prepared, "fp8", "max", "fp16")
    with as_written(subject):  # no kernel of ONNX Runtime on a CPU computes in FP8
        made = row(
            "FP8 by ModelOpt", "fp8", lambda p: file_by_plan(prepared, p, plan, {}, subject.calibration)
        )
    tower = "image" if prepared.has_convolutions else "text"
    return {
        **made,
        "engines": {t: engine_size(folder / "method.onnx", tower, "fp8", t) for t in _FP8_TARGETS},
    }


def engine_size(path: Path, tower: str, precision: str, target: str) -> str:
    """Build by TensorRT-RTX, which needs no GPU; return the size, or why not."""
    request = BuildRequest(
        onnx_path=str(path),
        targets=(load_target(target),),
        library="tensorrt-rtx",
        precision=precision,
        profiles=(tower_profile(tower, (1, 4, 8), (1, 16, 32)),),
    )
    try:
        return f"{len(engine_built_apart(request, QuietProgress()).plan) / 1e6:.1f} MB"
    except EdgeglmError as error:
        return str(error)[:160]


def both_rows(store: Store, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every trial of both towers together, as a build makes them, for a CPU and for a GPU."""
    pairs_artifact, exported, targets = (newest(store, kind) for kind in ("pairs", "export", "targets"))
    pairs = PairSet.open(pairs_artifact)
    scores = TowerScores(pairs, exported.path, threads=1, seed=0, minimum=0.99)
    calibration = calibration_set_from_arrays(
        folder / "calibration-both",
        calibration_candidates(pairs, targets.path, exported.path),
        preprocessing=json.loads((exported.path / "preprocessing.json").read_text()),
    )
    cpu = {
        tower: tuple(s.name for s in cpu_schemes(cpu_flags(), convolutions=tower == "image"))
        for tower in ("image", "text")
    }
    for place, config in (
        ("cpu", QuantizeConfig(candidates=("int8",), schemes=cpu, high_precision="fp32")),
        ("gpu", QuantizeConfig()),
    ):
        config = msgspec.structs.replace(config, methods=METHODS, search_evaluations=12)
        report = make_candidates(
            exported.path / "models" / "fp32",
            folder / f"both-{place}",
            calibration,
            evaluate=lambda _, files: scores.metrics(files),
            judge=scores.judged,
            config=config,
        )
        for name, trials in report.trials.items():
            for trial in trials:
                yield {
                    "target": place,
                    "variant": name,
                    "precisions": trial.precisions,
                    "kept": round(trial.verdict.score, 4),
                    "passed": trial.verdict.passed,
                    "reason": trial.verdict.reason,
                    "travels": name in report.variants and report.variants[name].sha256 == trial.sha256,
                    "made_by": _made_by(report.variants.get(name), trial.sha256),
                }
        if report.speedups:
            yield {"target": place, "speedups": report.speedups}


def _made_by(variant: Any, sha256: Mapping[str, str]) -> dict[str, str]:
    if variant is None or variant.sha256 != sha256:
        return {}
    return {
        tower: made.plan.scheme if made.plan else made.policy.name if made.policy else made.precision
        for tower, made in variant.conversions.items()
    }


def curve_rows(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield accuracy against set size, by the task's metric where there is one."""
    if subject.name not in _SUBJECTS:
        return
    for method in ("max", "percentile"):
        points = curve_of_sizes(subject.path, subject.calibration, SIZES, method=method, metric=subject.score)
        yield {"ranges": method, "points": msgspec.to_builtins(points)}
