"""The growing table: one row for each step of a build, with what it cost and what it kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edgeglm.adapt.backbones import read_backbones
from edgeglm.build.evaluations import Metrics, metrics_of, milliseconds_of
from edgeglm.build.latency_stage import latencies_of
from edgeglm.build.pools import gate_pools, pooled_map10
from edgeglm.build.timed_towers import Milliseconds
from edgeglm.bundle.manifest import Manifest
from edgeglm.calibration.variants import QuantizeReport, Trial, Variant
from edgeglm.core.artifact import Artifact
from edgeglm.core.stage import StageResult
from edgeglm.data.pairs import Track

#: The stages of each step that ends in an evaluation of its own.
STEPS: dict[str, tuple[str, ...]] = {
    "teacher": (
        "backbones",
        "features",
        "pretraining",
        "image-tuning",
        "tuned-features",
        "auxiliary-pairs",
        "auxiliary-features",
        "teacher",
        "teacher-evaluation",
    ),
    "distil": ("targets", "distil-text", "distil-image", "distil-evaluation"),
    "fp32": ("export", "export-evaluation"),
}
#: Stages that a recipe may do without.
OPTIONAL = ("pretraining", "image-tuning", "tuned-features", "auxiliary-pairs", "auxiliary-features")
TITLES = {
    "teacher": "Teacher",
    "distil": "Student in torch",
    "fp32": "Student, ONNX FP32",
    "reranker": "Re-ranker",
    "calibrate": "Calibration set",
    "compile": "Engines",
    "pack": "Bundle",
}
_LAST = {stages[-1]: step for step, stages in STEPS.items()}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step. ``seconds`` covers its stages; reused ones cost none.

    ``latency`` is of its own towers, one thread; None for a step without any and for a candidate left out.
    """

    title: str
    seconds: float
    reused: bool
    metrics: Metrics
    latency: Milliseconds | None = None
    size_bytes: int | None = None
    kept: bool = True
    note: str = ""


def rows_after(stage: str, results: Mapping[str, StageResult]) -> list[Row]:
    """Return the rows that can be shown once ``stage`` is done."""
    if stage in _LAST:
        return [_evaluated_row(_LAST[stage], results)]
    if stage == "reranker-evaluation":
        return [_reranker_row(results)]
    if stage == "latency":
        return _variant_rows(results)
    if stage == "compile":
        return [_compile_row(results[stage])]
    if stage == "pack":
        size = int(results[stage].artifact.provenance["measured"]["bytes"])
        return [_plain_row(stage, results[stage], size_bytes=size)]
    return []


def stages_of(step: str, made: Collection[str]) -> list[str]:
    """Return the stages of a step; an optional one only where it is among those made."""
    return [name for name in STEPS[step] if name in made or name not in OPTIONAL]


def quantize_report(artifact: Artifact) -> QuantizeReport:
    """Read what a quantize stage tried and kept."""
    return msgspec.json.decode((artifact.path / "variants.json").read_bytes(), type=QuantizeReport)


def best_trial(tried: QuantizeReport, name: str) -> Trial | None:
    """Return the evaluation of a candidate that kept most; None for one that never was evaluated."""
    return max(tried.trials.get(name, ()), key=lambda trial: trial.verdict.score, default=None)


def usable_metrics(measured: Trial | Variant | None) -> dict[str, Any]:
    """Return the figures of a trial or a variant; nothing where its embeddings are of no use."""
    return {} if measured is None or "unusable" in measured.metrics else measured.metrics


def teachers_backbones(made: Mapping[str, Artifact]) -> Artifact:
    """Return the backbones that the teacher has: those that were tuned, where they were."""
    return made.get("image-tuning", made["backbones"])


def teacher_sizes(backbones: Artifact, teacher: Artifact) -> dict[str, int]:
    """Return the bytes of each side of the teacher: backbones with their head, and the text tower."""
    files = [backbones.path / backbone.file for backbone in read_backbones(backbones.path)]
    image = sum(path.stat().st_size for path in (*files, teacher.path / "image-head.onnx"))
    return {"image": image, "text": (teacher.path / "text.onnx").stat().st_size}


def torch_sizes(image: Artifact, text: Artifact) -> dict[str, int]:
    """Return the bytes of the students' weights in torch."""
    return {
        "image": (image.path / "image.safetensors").stat().st_size,
        "text": (text.path / "text.safetensors").stat().st_size,
    }


def _evaluated_row(step: str, results: Mapping[str, StageResult]) -> Row:
    parts = [results[name] for name in stages_of(step, results)]
    evaluated = parts[-1].artifact
    made = {name: result.artifact for name, result in results.items()}
    if step == "teacher":
        sizes = sum(teacher_sizes(teachers_backbones(made), made["teacher"]).values())
    elif step == "distil":
        sizes = sum(torch_sizes(made["distil-image"], made["distil-text"]).values())
    else:
        folder = made["export"].path / "models" / "fp32"
        sizes = sum(path.stat().st_size for path in folder.glob("*.onnx"))
    return Row(
        title=TITLES[step],
        seconds=sum(part.seconds for part in parts),
        reused=all(part.reused for part in parts),
        metrics=metrics_of(evaluated),
        latency=milliseconds_of(evaluated),
        size_bytes=sizes,
    )


#: Said of a variant whose towers went on learning because INT8 of the ones before missed its gate.
TUNED = "tuned while rounded"


def _variant_rows(results: Mapping[str, StageResult]) -> list[Row]:
    result = results["quantize"]
    tried, latency = quantize_report(result.artifact), latencies_of(results["latency"].artifact)
    alone = 0.0 if result.reused else max(result.seconds - sum(tried.seconds.values()), 0.0)
    rows = [Row(title=TITLES["calibrate"], seconds=alone, reused=result.reused, metrics={})]
    for name, seconds in tried.seconds.items():
        kept = tried.variants.get(name)
        metrics = usable_metrics(kept or best_trial(tried, name))
        rows.append(
            Row(
                title=f"Student, {name.upper()}",
                seconds=0.0 if result.reused else seconds,
                reused=result.reused,
                metrics=msgspec.convert(metrics, Metrics),
                latency=latency.get(name),
                size_bytes=sum(kept.size_bytes.values()) if kept else None,
                kept=kept is not None,
                note=TUNED if kept and kept.tuned else tried.left_out.get(name, ""),
            )
        )
    return rows


def _reranker_row(results: Mapping[str, StageResult]) -> Row:
    parts = [results[name] for name in ("reranker", "reranker-evaluation")]
    found = parts[1].artifact.provenance["measured"]
    changes = [
        f"{name} {said['without']:.3f} -> {said['with']:.3f}" for name, said in found["tracks"].items()
    ]
    return Row(
        title=TITLES["reranker"],
        seconds=sum(part.seconds for part in parts),
        reused=all(part.reused for part in parts),
        metrics={},
        size_bytes=(parts[0].artifact.path / "model.onnx").stat().st_size,
        note=f"{found['latency_ms']['reranker']:.1f} ms for {found['candidates']} pictures; mAP@10 "
        + ", ".join(changes),
    )


def _compile_row(result: StageResult) -> Row:
    sizes = [
        (result.artifact.path / name).stat().st_size
        for name in result.artifact.files
        if name.startswith("engines/") and name.endswith(".plan")
    ]
    note = compile_note(result.artifact)
    return _plain_row("compile", result, size_bytes=sum(sizes) or None, note=note)


def compile_note(artifact: Artifact) -> str:
    """Say how many engines were built here, and how many devices build their own."""
    measured = artifact.provenance["measured"]
    deferred = sum(status == "deferred" for status in measured["members"].values())
    devices = f"{deferred} device{'' if deferred == 1 else 's'}"
    later = f", deferred to {devices}" if deferred else ""
    return f"{measured['engines']} built here{later}"


def _plain_row(step: str, result: StageResult, *, size_bytes: int | None, note: str = "") -> Row:
    return Row(
        title=TITLES[step],
        seconds=result.seconds,
        reused=result.reused,
        metrics={},
        size_bytes=size_bytes,
        note=note,
    )


def summary_of(metrics: Metrics) -> tuple[float | None, ...]:
    """Return the figures of one table row.

    mAP@10 on names, on unseen names and on keywords, each over all queries of its tracks; then
    R@1, R@10, and both from image to text, on names; all languages together. None where there is no such
    track.
    """
    unseen = [n for n in metrics if n == "unseen" or n.endswith("-unseen")]
    names = [n for n in metrics if not n.endswith("-keywords") and n not in unseen]
    pools = (names, unseen, [n for n in metrics if n.endswith("-keywords")])
    scores = [pooled_map10(metrics, pool) if pool else None for pool in pools]
    recalls: list[float | None] = []
    for field in ("r1", "r10", "r1_i2t", "r10_i2t"):
        values = [(getattr(metrics[n], field), metrics[n].queries) for n in names]
        total = sum(count for _, count in values)
        recalls.append(sum(value * count for value, count in values) / total if total else None)
    return (*scores, *recalls)


def language_rows(rows: Sequence[Row], tracks: Sequence[Track]) -> list[tuple[str, ...]]:
    """Return mAP@10 of each evaluated step on the pools of each language; nothing for one language."""
    if len({track.language for track in tracks}) < 2:
        return []
    pools = gate_pools(tracks)
    shown = [row for row in rows if row.metrics]
    return [
        (row.title, *(f"{pooled_map10(row.metrics, members):.3f}" for members in pools.values()))
        for row in shown
    ]


def latency_rows(results: Mapping[str, StageResult], manifest: Manifest) -> list[tuple[str, ...]]:
    """Return the last table: milliseconds of each model, and what they are against the teacher."""
    latency = latencies_of(results["latency"].artifact)
    teacher = latency["teacher"]
    made = {name: result.artifact for name, result in results.items()}
    counts = teachers_backbones(made).provenance["measured"]["parameters"]
    heads = results["teacher"].artifact.provenance["measured"]["parameters"]
    parameters = {"teacher": counts + heads["image_head"] + heads["text"]}
    student = sum(tower.parameters for tower in manifest.towers.values())
    rows = []
    timed = [variant.name for variant in manifest.variants if variant.name in latency]
    for model in ("teacher", *timed):
        cells = []
        for tower, batch in (("image", "1"), ("image", "8"), ("text", "1"), ("text", "8")):
            value = latency[model][tower][batch]
            faster = "" if model == "teacher" else f" ({teacher[tower][batch] / value:.1f}x)"
            cells.append(f"{value:.2f}{faster}")
        count = parameters.get(model, student)
        fewer = "" if model == "teacher" else f" ({parameters['teacher'] / count:.1f}x fewer)"
        rows.append((model, *cells, f"{count / 1e6:.2f} M{fewer}"))
    return rows
