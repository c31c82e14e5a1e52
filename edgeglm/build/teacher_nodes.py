"""The stages that make a teacher and measure it: the first of every build, and all of ``edgeglm adapt``."""

from __future__ import annotations

from collections.abc import Iterator

from edgeglm.adapt.features_stage import (
    AuxiliaryFeaturesStage,
    BackbonesConfig,
    BackbonesStage,
    FeaturesConfig,
    FeaturesStage,
)
from edgeglm.adapt.image_tuning_stage import ImageTuningStage, TunedFeaturesStage
from edgeglm.adapt.pretraining_stage import PretrainingStage
from edgeglm.adapt.teacher_stage import TeacherStage
from edgeglm.build.evaluations import EvaluationConfig, TeacherEvaluation
from edgeglm.build.nodes import Node
from edgeglm.build.sources import TEXT, Needs
from edgeglm.core.recipe import Recipe
from edgeglm.data.auxiliary import AuxiliaryPairsConfig, AuxiliaryPairsStage
from edgeglm.data.sources import pairs_stage


def backbones_of(recipe: Recipe) -> str:
    """Return the stage whose backbones the finished teacher looks through."""
    return "image-tuning" if recipe.teacher.image_blocks else "backbones"


def teacher_nodes(recipe: Recipe, needs: Needs) -> Iterator[Node]:
    """Yield the stages in order, from the pairs to the teacher's evaluation."""
    teacher, seed, length = recipe.teacher, recipe.seed, recipe.student.max_length
    views = FeaturesConfig(views=teacher.views, seed=seed)
    yield Node(stage=pairs_stage(recipe.data, seed=seed), needs=needs["data"])
    yield Node(
        stage=BackbonesStage(BackbonesConfig.of(teacher)),
        needs=needs["teacher"],
    )
    yield Node(stage=FeaturesStage(views), needs={"pairs": "pairs", "backbones": "backbones"})
    backbones = backbones_of(recipe)
    given = {"pairs": "pairs", "features": "features", "text": TEXT}
    if teacher.conse.weight:
        given["class-names"] = needs["teacher"]["class-names"]
    if teacher.pretraining.epochs:
        yield Node(
            stage=PretrainingStage(teacher, seed=seed, max_length=length),
            needs={"pairs": "pairs", "text": TEXT, **needs["reading"]},
        )
        given["pretraining"] = "pretraining"
    if teacher.image_blocks:
        yield Node(
            stage=ImageTuningStage(teacher, seed=seed, max_length=length),
            needs={**given, **needs["teacher"], "backbones": "backbones"},
        )
        yield Node(stage=TunedFeaturesStage(views), needs={"pairs": "pairs", "backbones": backbones})
        given["features"] = "tuned-features"
    if teacher.auxiliary.icons:
        yield Node(
            stage=AuxiliaryPairsStage(AuxiliaryPairsConfig(icons=teacher.auxiliary.icons)),
            needs={"pairs": "pairs", **needs["auxiliary"]},
        )
        yield Node(
            stage=AuxiliaryFeaturesStage(views),
            needs={"pairs": "auxiliary-pairs", "backbones": backbones},
        )
        given |= {name: name for name in ("auxiliary-pairs", "auxiliary-features")}
    yield Node(stage=TeacherStage(teacher, seed=seed, max_length=length), needs=given)
    yield Node(
        stage=TeacherEvaluation(EvaluationConfig(seed=seed)),
        needs={"pairs": "pairs", "teacher": "teacher", "backbones": backbones},
    )
