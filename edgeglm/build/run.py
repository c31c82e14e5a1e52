"""Run a plan: each stage from the store or anew, its gate, its row in the table, and the finished bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeglm.build.evaluations import metrics_of, precisions_of
from edgeglm.build.history import remember
from edgeglm.build.nodes import Node
from edgeglm.build.pack_stage import BUNDLE_FOLDER
from edgeglm.build.pipeline import Plan, candidate_precisions
from edgeglm.build.pools import gate_pools, pooled_map10, pooled_ratio, required_pools
from edgeglm.build.stage_memory import run_stage
from edgeglm.build.student_fit import (
    StudentFitConfig,
    StudentFitStage,
    require_untrained_fit,
    untrained_fits,
)
from edgeglm.build.suited import require_suited
from edgeglm.build.table import Row, rows_after
from edgeglm.bundle.archive import ArchiveKind
from edgeglm.bundle.manifest import MANIFEST_NAME, Manifest, manifest_from_bytes
from edgeglm.bundle.pack import archive_path, write_bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import EdgeglmError
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Context, StageResult
from edgeglm.data.pairs import PairSet
from edgeglm.evaluate.gates import require_at_least, require_ratio
from edgeglm.targets.schema import resolve_target


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

    _require_fit(plan, context)
    for node in plan.nodes:
        inputs = plan.inputs_of(node, made)
        assert inputs is not None, node.name
        result = run_stage(node.stage, inputs, context)
        made[node.name], results[node.name] = result.artifact, result
        remember(context.store.root, plan, node, result.artifact)
        on_stage(result)
        _check_gates(node, made, plan.recipe)
        if node.name == "pairs":
            require_suited(plan.recipe, result.artifact, plan.sources, context)
        for row in rows_after(node.name, results):
            rows.append(row)
            on_row(row)
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
            entries=(plan.recipe.teacher.vocabulary, student.vocabulary),
        )
    )
    costs = stage({"text": plan.sources["teacher:text"]}, context).artifact
    candidates = candidate_precisions(plan.recipe, plan.target)
    target = resolve_target(plan.target, plan.recipe.engine)
    require_untrained_fit(untrained_fits(costs, candidates, target))


def _check_gates(node: Node, made: Mapping[str, Artifact], recipe: Recipe) -> None:
    """Stop where a required gate is not met, or could not be judged."""
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
    pools = gate_pools(tracks)
    student = metrics_of(made["export-evaluation"])
    for pool in required_pools(pools):
        names = pools[pool]
        if recipe.gates.judge == "interval":
            found = pooled_ratio(
                precisions_of(made["export-evaluation"]), precisions_of(made["teacher-evaluation"]), names
            )
            if found is not None and found.value < recipe.gates.student_ratio <= found.high:
                continue  # so few queries that the value alone says nothing; the report shows both
        require_ratio(
            f"student / teacher mAP@10 on {pool}",
            value=pooled_map10(student, names),
            reference=pooled_map10(teacher, names),
            minimum=recipe.gates.student_ratio,
            remedy="train longer (student.image_epochs), choose a larger student.size, "
            "or lower gates.student_ratio",
        )


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
