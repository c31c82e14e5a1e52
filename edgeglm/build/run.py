"""Run a plan: each stage from the store or anew, its gate, its row in the table, and the finished bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.build.evaluations import Metrics, metrics_of
from edgeglm.build.history import remember
from edgeglm.build.latency_stage import latencies_of
from edgeglm.build.pack_stage import BUNDLE_FOLDER
from edgeglm.build.pipeline import Node, Plan, candidate_precisions
from edgeglm.build.pools import gate_pools, pooled_map10
from edgeglm.build.student_fit import (
    StudentFitConfig,
    StudentFitStage,
    require_untrained_fit,
    untrained_fits,
)
from edgeglm.bundle.archive import ArchiveKind
from edgeglm.bundle.manifest import MANIFEST_NAME, Manifest, manifest_from_bytes
from edgeglm.bundle.pack import archive_path, write_bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.calibration.quantize import QuantizeReport
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Context, StageResult
from edgeglm.data.pairs import PairSet
from edgeglm.evaluate.gates import require_at_least, require_ratio
from edgeglm.targets.schema import resolve_target

_ROWS = {
    "teacher-evaluation": ("Teacher", ("backbones", "features", "pretraining", "teacher", "teacher-evaluation")),
    "distil-evaluation": (
        "Student in torch",
        ("targets", "distil-text", "distil-image", "distil-evaluation"),
    ),
    "export-evaluation": ("Student, ONNX FP32", ("export", "export-evaluation")),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated step, for the growing table. ``seconds`` covers its stages; reused ones cost none."""

    title: str
    seconds: float
    reused: bool
    metrics: Metrics
    size_bytes: int | None = None
    kept: bool = True
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build gave."""

    bundle: Path
    archive: Path | None
    manifest: Manifest
    results: tuple[StageResult, ...]
    rows: tuple[Row, ...]


def _ignore(_: object) -> None:
    """Tell nobody."""


def run_build(
    plan: Plan,
    destination: Path,
    context: Context,
    *,
    on_stage: Callable[[StageResult], None] = _ignore,
    on_row: Callable[[Row], None] = _ignore,
) -> Built:
    """Run every stage of a plan in order and put the bundle in place.

    A stage that the store has is not run again. Killed at any moment, the same call goes on after the
    last finished stage.

    Args:
        plan: From ``plan_build``.
        destination: The bundle folder; an older bundle there is replaced in one step.
        context: Store, progress, threads.
        on_stage: Told of each stage when it is done.
        on_row: Told of each evaluated step when it is done.

    Raises:
        GateError: Teacher or student are below the recipe's gates; nothing is packed.
        UserError: The data or the destination cannot be used.
    """
    made: dict[str, Artifact] = {}
    results: dict[str, StageResult] = {}
    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        on_row(row)

    _require_fit(plan, context)
    for node in plan.nodes:
        inputs = plan.inputs_of(node, made)
        assert inputs is not None, node.name
        result = node.stage(inputs, context)
        made[node.name], results[node.name] = result.artifact, result
        remember(context.store.root, plan, node, result.artifact)
        on_stage(result)
        _check_gates(node, made, plan.recipe)
        for row in _rows_after(node, results):
            show(row)
    bundle, manifest = _delivered(made["pack"], destination, plan.recipe.pack.archive)
    return Built(
        bundle=bundle,
        archive=archive_path(bundle, plan.recipe.pack.archive),
        manifest=manifest,
        results=tuple(results.values()),
        rows=tuple(rows),
    )


def _require_fit(plan: Plan, context: Context) -> None:
    """Ask every board whether it will take the student, before hours are spent on it."""
    student = plan.recipe.student
    stage = StudentFitStage(
        StudentFitConfig(
            size=student.size,
            resolution=student.resolution,
            max_length=student.max_length,
            embedding_dim=plan.recipe.teacher.embedding_dim,
            opset=plan.recipe.export.opset,
            text_teacher=plan.recipe.teacher.text,
        )
    )
    costs = stage({"text": plan.sources["teacher:text"]}, context).artifact
    candidates = candidate_precisions(plan.recipe, plan.target)
    target = resolve_target(plan.target, plan.recipe.engine)
    require_untrained_fit(untrained_fits(costs, candidates, target))


def _check_gates(node: Node, made: Mapping[str, Artifact], recipe: Recipe) -> None:
    """Stop where a required gate is not met, or could not be judged."""
    if node.name == "pairs" and not PairSet.open(made["pairs"]).tracks:
        raise UserError(
            "no image is held out of training, so nothing could be evaluated; raise data.unseen_fraction"
        )
    if node.name not in ("teacher-evaluation", "export-evaluation"):
        return
    tracks = PairSet.open(made["pairs"]).tracks
    teacher = metrics_of(made["teacher-evaluation"])
    if node.name == "teacher-evaluation":
        main = tracks[0].name
        require_at_least(
            f"the teacher's mAP@10 on {main}",
            teacher[main].map10.value,
            recipe.gates.teacher_map10,
            remedy="train longer (teacher.epochs), use a stronger backbone, or lower gates.teacher_map10",
        )
        return
    names = gate_pools(tracks)["names"]
    require_ratio(
        "student / teacher mAP@10 on names",
        value=pooled_map10(metrics_of(made["export-evaluation"]), names),
        reference=pooled_map10(teacher, names),
        minimum=recipe.gates.student_ratio,
        remedy="train longer (student.image_epochs), choose a larger student.size, "
        "or lower gates.student_ratio",
    )


def _rows_after(node: Node, results: Mapping[str, StageResult]) -> list[Row]:
    if node.name == "quantize":
        return _variant_rows(results["quantize"])
    if node.name not in _ROWS:
        return []
    title, stages = _ROWS[node.name]
    parts = [results[name] for name in stages if name in results]
    sizes = {
        "export-evaluation": results["export"].artifact if "export" in results else None,
    }.get(node.name)
    return [
        Row(
            title=title,
            seconds=sum(part.seconds for part in parts),
            reused=all(part.reused for part in parts),
            metrics=metrics_of(results[node.name].artifact),
            size_bytes=None if sizes is None else _onnx_bytes(sizes.path / "models" / "fp32"),
        )
    ]


def _variant_rows(result: StageResult) -> list[Row]:
    folder = result.artifact.path
    tried = msgspec.json.decode((folder / "variants.json").read_bytes(), type=QuantizeReport)
    rows = []
    for name, trials in tried.trials.items():
        kept = tried.variants.get(name)
        best = max(trials, key=lambda trial: trial.verdict.score)
        metrics: Mapping[str, Any] = kept.metrics if kept else best.metrics
        rows.append(
            Row(
                title=f"Student, {name.upper()}",
                seconds=result.seconds if name == next(iter(tried.trials)) else 0.0,
                reused=result.reused,
                metrics={} if "unusable" in metrics else msgspec.convert(dict(metrics), Metrics),
                size_bytes=sum(kept.size_bytes.values()) if kept else None,
                kept=kept is not None,
                note=best.verdict.reason if kept else tried.left_out[name],
            )
        )
    return rows


def _onnx_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.onnx"))


def _delivered(packed: Artifact, destination: Path, archive: ArchiveKind) -> tuple[Path, Manifest]:
    """Copy the packed bundle to its place, unless it lies there already, whole."""
    folder = packed.path / BUNDLE_FOLDER
    written = (folder / MANIFEST_NAME).read_bytes()
    manifest = manifest_from_bytes(written, str(folder / MANIFEST_NAME))
    beside = archive_path(destination, archive)
    if (beside is None or beside.exists()) and _lies_there(destination, written):
        return destination, manifest
    sources: dict[str, Path | bytes] = {name: folder / name for name in manifest.files}
    return write_bundle(destination, sources=sources, manifest=manifest, archive=archive), manifest


def _lies_there(destination: Path, manifest: bytes) -> bool:
    try:
        if (destination / MANIFEST_NAME).read_bytes() != manifest:
            return False
        with open_bundle(destination):
            return True
    except (OSError, EdgeglmError, json.JSONDecodeError):
        return False


def summary_of(metrics: Metrics) -> tuple[float | None, ...]:
    """Return the figures of one table row.

    mAP@10 on names, on unseen names and on keywords, each over all queries of its tracks; then
    R@1, R@10, and both from image to text, on names. None where there is no such track.
    """
    names = [n for n in metrics if not n.endswith("-keywords") and n != "unseen"]
    pools = (names, [n for n in metrics if n == "unseen"], [n for n in metrics if n.endswith("-keywords")])
    scores = [pooled_map10(metrics, pool) if pool else None for pool in pools]
    recalls: list[float | None] = []
    for field in ("r1", "r10", "r1_i2t", "r10_i2t"):
        values = [(getattr(metrics[n], field), metrics[n].queries) for n in names]
        total = sum(count for _, count in values)
        recalls.append(sum(value * count for value, count in values) / total if total else None)
    return (*scores, *recalls)


def latency_rows(built: Built) -> list[tuple[str, ...]]:
    """Return the last table: milliseconds of each model, and what they are against the teacher."""
    by_stage = {result.stage: result.artifact for result in built.results}
    latency = latencies_of(by_stage["latency"])
    teacher = latency["teacher"]
    counts = by_stage["backbones"].provenance["measured"]["parameters"]
    heads = by_stage["teacher"].provenance["measured"]["parameters"]
    parameters = {"teacher": counts + heads["image_head"] + heads["text"]}
    student = sum(tower.parameters for tower in built.manifest.towers.values())
    rows = []
    timed = [variant.name for variant in built.manifest.variants if variant.name in latency]
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
