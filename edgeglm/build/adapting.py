"""The first stages of a build by themselves: a teacher, evaluated, and delivered as a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeglm.adapt.image_tuning_stage import ImageTuningStage, TunedFeaturesStage, require_tunable
from edgeglm.adapt.pretraining_stage import PretrainingStage, pretraining_inputs
from edgeglm.adapt.stages import (
    AuxiliaryFeaturesStage,
    BackbonesConfig,
    BackbonesStage,
    FeaturesConfig,
    FeaturesStage,
    TeacherStage,
    teacher_inputs,
)
from edgeglm.adapt.targets import require_targets
from edgeglm.build.evaluations import EvaluationConfig, Metrics, TeacherEvaluation, metrics_of
from edgeglm.build.stage_memory import run_stage
from edgeglm.build.unheard import require_elsewhere, require_heard_teacher
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Context, Inputs, Stage, StageResult
from edgeglm.data.auxiliary import AuxiliaryPairsConfig, AuxiliaryPairsStage
from edgeglm.data.sources import auxiliary_inputs, pairs_inputs, pairs_stage


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
        UserError: The destination is taken, or the data cannot be used.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is there already; choose another --output or move it away")
    store, progress, teacher, seed = context.store, context.progress, recipe.teacher, recipe.seed
    require_heard_teacher(teacher)
    require_elsewhere(teacher.auxiliary.icons, recipe.data)
    require_tunable(teacher)
    towers = teacher_inputs(teacher, store, progress)
    require_targets(teacher, towers["text"])
    corpus = pretraining_inputs(teacher, store, progress)
    icons = auxiliary_inputs(teacher.auxiliary.icons, store, progress)
    results: list[StageResult] = []

    def done(stage: Stage[Any], inputs: Inputs) -> Artifact:
        results.append(run_stage(stage, inputs, context))
        on_stage(results[-1])
        return results[-1].artifact

    pairs = done(pairs_stage(recipe.data, seed=seed), pairs_inputs(recipe.data, store, progress))
    images = {name: artifact for name, artifact in towers.items() if name != "text"}
    views = FeaturesConfig(views=teacher.views, seed=seed)
    backbones = done(
        BackbonesStage(BackbonesConfig(image=teacher.image, resolution=teacher.resolution)), images
    )
    features = done(FeaturesStage(views), {"pairs": pairs, "backbones": backbones})
    given = {"pairs": pairs, "features": features, "text": towers["text"]}
    length = recipe.student.max_length
    if teacher.pretraining.epochs:
        reading = PretrainingStage(teacher, seed=seed, max_length=length)
        given["pretraining"] = done(reading, {"pairs": pairs, "text": towers["text"], **corpus})
    if teacher.image_blocks:
        tuning = ImageTuningStage(teacher, seed=seed, max_length=length)
        backbones = done(tuning, {**given, **images, "backbones": backbones})
        given["features"] = done(TunedFeaturesStage(views), {"pairs": pairs, "backbones": backbones})
    if icons:
        others = AuxiliaryPairsConfig(icons=teacher.auxiliary.icons)
        more = done(AuxiliaryPairsStage(others), {"pairs": pairs, **icons})
        given["auxiliary-pairs"] = more
        given["auxiliary-features"] = done(
            AuxiliaryFeaturesStage(views), {"pairs": more, "backbones": backbones}
        )
    aligned = done(TeacherStage(teacher, seed=seed, max_length=length), given)
    evaluated = done(
        TeacherEvaluation(EvaluationConfig(seed=seed)),
        {"pairs": pairs, "teacher": aligned, "backbones": backbones},
    )
    _deliver(aligned, backbones, evaluated, destination)
    return Adapted(folder=destination, metrics=metrics_of(evaluated), teacher=aligned, results=tuple(results))


def _deliver(teacher: Artifact, backbones: Artifact, evaluated: Artifact, destination: Path) -> None:
    """Copy everything beside the destination first: what is there is whole."""
    beside = destination.with_name(f".{destination.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for artifact in (teacher, backbones, evaluated):
            for name in artifact.files:
                path = beside / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.path / name, path)
        if destination.exists():
            destination.rmdir()
        beside.rename(destination)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
