"""The first stages of a build by themselves: a teacher, evaluated, and delivered as a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeglm.adapt.image_tuning_stage import require_tunable
from edgeglm.build.evaluations import Metrics, metrics_of
from edgeglm.build.sources import sources_of, teacher_rooms
from edgeglm.build.stage_memory import run_stage
from edgeglm.build.suited import require_suited
from edgeglm.build.teacher_nodes import backbones_of, teacher_nodes
from edgeglm.build.unheard import require_elsewhere, require_heard_data, require_heard_teacher
from edgeglm.bundle.atomic import disk_errors, put_in_place, staging_folder
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Context, StageResult


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """An adapted teacher: its folder, what it reaches on each track, and how it was made."""

    folder: Path
    metrics: Metrics
    teacher: Artifact
    results: tuple[StageResult, ...]


def adapt_teacher(
    recipe: Recipe,
    destination: Path,
    context: Context,
    *,
    on_stage: Callable[[StageResult], None] = lambda _: None,
) -> Adapted:
    """Make the teacher of a recipe, or take it from the store, and copy it to ``destination``.

    The stages are those of ``edgeglm build``, with the same keys: a build after it reuses all of them.

    Args:
        recipe: Its ``data`` and ``teacher`` tables count, the seed, and ``student.max_length``.
        destination: A folder that is not there yet, or is empty.
        context: Store, progress, threads.
        on_stage: Told of each stage when it is done.

    Raises:
        UserError: The destination is taken or cannot be written, or the data cannot be used.
    """
    _require_free(destination)
    require_heard_data(recipe.data)
    require_heard_teacher(recipe.teacher)
    require_elsewhere(recipe.teacher.auxiliary.icons, recipe.data)
    require_tunable(recipe.teacher)
    sources = sources_of(recipe, teacher_rooms(recipe), context.store, context.progress)
    known, results = dict(sources.found), list[StageResult]()
    for node in teacher_nodes(recipe, sources.needs):
        inputs = node.inputs(known)
        assert inputs is not None, node.name
        results.append(run_stage(node.stage, inputs, context))
        known[node.name] = results[-1].artifact
        on_stage(results[-1])
        if node.name == "pairs":
            require_suited(recipe, known["pairs"], sources.found, context, student=False)
    teacher, evaluated = known["teacher"], known["teacher-evaluation"]
    _deliver(teacher, known[backbones_of(recipe)], evaluated, destination.resolve())
    return Adapted(folder=destination, metrics=metrics_of(evaluated), teacher=teacher, results=tuple(results))


def _require_free(destination: Path) -> None:
    """Raise UserError where no folder could be put: asked before anything is trained."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is there already; choose another --output or move it away")
    above = next(folder for folder in destination.resolve().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "cannot be written" if above.is_dir() else "is no folder"
        raise UserError(f"{above} {what}, so nothing can be put at {destination}; choose another --output")


def _deliver(teacher: Artifact, backbones: Artifact, evaluated: Artifact, destination: Path) -> None:
    """Copy everything beside the destination first: what is there is whole."""
    with disk_errors(destination), staging_folder(destination) as beside:
        for artifact in (teacher, backbones, evaluated):
            for name in artifact.files:
                path = beside / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.path / name, path)
        _require_free(destination)  # nothing may have come there meanwhile that would be replaced
        put_in_place(beside, destination)
