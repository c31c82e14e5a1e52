"""Keys of a recipe that change nothing where others are as they are, refused before anything is made."""

from __future__ import annotations

from collections.abc import Sequence

from edgeglm.core.errors import UserError
from edgeglm.core.recipe import AuxiliaryConfig, DataConfig, DomainConfig, LossesConfig, Recipe, TeacherConfig
from edgeglm.data.auxiliary import auxiliary_assets
from edgeglm.models.student_shapes import STUDENTS, student_shape


def require_heard(recipe: Recipe) -> None:
    """Raise UserError for a key that nothing would read, or that another contradicts.

    A key that has its default value is taken for one that was not set.
    """
    require_heard_teacher(recipe.teacher)
    student, views = recipe.student, recipe.teacher.views
    shape = student_shape(student.size)
    if shape.heir and recipe.teacher.vocabulary:
        raise UserError(
            f"{student.size} inherits the whole input table of the teacher; set teacher.vocabulary to 0, or "
            "choose another student.size"
        )
    patch = shape.patch
    if patch and student.resolution % patch:
        near = student.resolution // patch * patch or patch
        raise UserError(
            f"student.resolution is {student.resolution}, and {student.size} reads patches of {patch} "
            f"pixels, so that a rest would go unseen; set it to {near}, or {near + patch}"
        )
    if student.branches and patch:
        others = ", ".join(sorted(name for name, shape in STUDENTS.items() if not shape.patch))
        raise UserError(
            f"student.branches is for convolutions, and the image tower of {student.size} has none; leave it "
            f"out, or set student.size to one of {others}"
        )
    if student.losses.steps != LossesConfig().steps and not any(student.losses.weights().values()):
        raise UserError(
            f"student.losses.steps is {student.losses.steps} and no loss has a weight, so towers learn by "
            f"themselves; set one of {', '.join(student.losses.weights())} above 0, or leave it out"
        )
    if student.image_target == "each" and student.views > views:
        raise UserError(
            f"student.image_target is 'each', and the teacher has {views} views where student.views is "
            f"{student.views}; set student.views to at most {views}, or teacher.views to {student.views}"
        )
    if recipe.reranker.enabled and min(recipe.reranker.negatives, recipe.reranker.candidates) < 2:
        raise UserError(
            "a re-ranker learns from and orders several candidates, and one of reranker.negatives "
            f"({recipe.reranker.negatives}) and reranker.candidates ({recipe.reranker.candidates}) is 1; set "
            "both to 2 or more"
        )


def require_heard_teacher(teacher: TeacherConfig) -> None:
    """Raise UserError for a key of the teacher that nothing would read."""
    domain = teacher.domain
    if domain.pseudo_label_epochs != DomainConfig().pseudo_label_epochs and not domain.pseudo_label_rounds:
        raise UserError(
            f"teacher.domain.pseudo_label_epochs is {domain.pseudo_label_epochs} and there are no rounds of "
            "pseudo-labels; set teacher.domain.pseudo_label_rounds above 0, or leave it out"
        )
    auxiliary = teacher.auxiliary
    if not auxiliary.icons and auxiliary != AuxiliaryConfig():
        raise UserError(
            "teacher.auxiliary has options and names no icons; set teacher.auxiliary.icons, such as "
            '["game-icons"], or leave the table out'
        )
    if teacher.ensemble == "scaled" and len(teacher.image) == 1:
        raise UserError(
            f"teacher.ensemble is 'scaled', and teacher.image is {teacher.image[0]} alone; name a second "
            "backbone in teacher.image, or leave teacher.ensemble out"
        )


def require_elsewhere(icons: Sequence[str], data: DataConfig) -> None:
    """Raise UserError for an auxiliary icon set that is unknown, or that the pairs themselves are made of."""
    auxiliary_assets(tuple(icons))
    if data.source != "icons":
        return
    for name in icons:
        if name in (*data.labelled, data.target):
            raise UserError(
                f"teacher.auxiliary.icons names {name}, which data.labelled or data.target names too; "
                "auxiliary pictures are of other domains, so take it out of one of them"
            )
