"""Keys of a recipe that change nothing where others are as they are, refused before anything is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from edgeglm.adapt.targets import require_shared
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import (
    AuxiliaryConfig,
    DataConfig,
    LossesConfig,
    Recipe,
    RerankerConfig,
    StudentConfig,
    TeacherConfig,
)
from edgeglm.core.teacher_config import PretrainingConfig
from edgeglm.data.auxiliary import auxiliary_assets
from edgeglm.models.student_shapes import STUDENTS, student_shape


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Keys of the teacher, when something reads them, and what to tell who set one where nothing does."""

    keys: tuple[str, ...]
    reads: Callable[[TeacherConfig], bool]
    why: str
    remedy: str


_LOW_RANK = ("lora", "rslora", "dora")
_ADAPTED = (*_LOW_RANK, "ia3")
_NARROW = (*_LOW_RANK, "bottleneck", "p-tuning")
#: How long each student tower learns by itself; where both learn together, ``losses.steps`` says it.
_PASSES = ("image_epochs", "text_epochs", "caption_repeats")
_PROMPTS = ("prompt", "p-tuning")
_READERS = (
    _Reader(
        keys=("domain.pseudo_label_epochs",),
        reads=lambda teacher: teacher.domain.pseudo_label_rounds > 0,
        why="there are no rounds of pseudo-labels",
        remedy="set teacher.domain.pseudo_label_rounds above 0",
    ),
    _Reader(
        keys=tuple(f"multitask.reptile_{name}" for name in ("over", "steps", "reach")),
        reads=lambda teacher: teacher.multitask.reptile_rounds > 0,
        why="there are no rounds of Reptile",
        remedy="set teacher.multitask.reptile_rounds above 0",
    ),
    _Reader(
        keys=("multitask.soft_weight",),
        reads=lambda teacher: teacher.multitask.sharing == "soft",
        why="heads are shared whole",
        remedy='set teacher.multitask.sharing = "soft"',
    ),
    _Reader(
        keys=("multitask.gradnorm_alpha",),
        reads=lambda teacher: teacher.multitask.balance == "gradnorm",
        why="losses are balanced otherwise",
        remedy='set teacher.multitask.balance = "gradnorm"',
    ),
    _Reader(
        keys=("conse.temperature", "conse.resolution"),
        reads=lambda teacher: teacher.conse.weight > 0,
        why="no classifier is asked",
        remedy="set teacher.conse.weight above 0",
    ),
    _Reader(
        keys=("image_epochs", "image_rate", "image_batch_size"),
        reads=lambda teacher: teacher.image_blocks > 0,
        why="no block of the image tower is tuned",
        remedy="set teacher.image_blocks above 0",
    ),
    _Reader(
        keys=("tuning", "tuned_blocks", "lora_targets"),
        reads=lambda teacher: teacher.lora_epochs > 0,
        why="the text tower stays frozen",
        remedy="set teacher.lora_epochs above 0",
    ),
    _Reader(
        keys=("tuned_rate",),
        reads=lambda teacher: teacher.tuning in ("partial", "full"),
        why="adapters learn at teacher.lora_learning_rate",
        remedy="set that one",
    ),
    _Reader(
        keys=("lora_learning_rate",),
        reads=lambda teacher: teacher.tuning not in ("partial", "full"),
        why="blocks themselves learn at teacher.tuned_rate",
        remedy="set that one",
    ),
    _Reader(
        keys=("virtual_tokens",),
        reads=lambda teacher: teacher.tuning in _PROMPTS,
        why="there is no prompt",
        remedy='set teacher.tuning = "prompt" or "p-tuning"',
    ),
    _Reader(
        keys=("lora_targets",),
        reads=lambda teacher: teacher.tuning in _ADAPTED,
        why="teacher.tuning adapts no single layers",
        remedy=f"set it to one of {', '.join(_ADAPTED)}",
    ),
    _Reader(
        keys=("lora_rank",),
        reads=lambda teacher: teacher.tuning in _NARROW,
        why="nothing narrow is put into the text tower",
        remedy=f"set teacher.tuning to one of {', '.join(_NARROW)}",
    ),
    _Reader(
        keys=("lora_alpha", "lora_dropout"),
        reads=lambda teacher: teacher.tuning in _LOW_RANK,
        why="there is no adapter of low rank",
        remedy=f"set teacher.tuning to one of {', '.join(_LOW_RANK)}",
    ),
    _Reader(
        keys=tuple(f"pretraining.{name}" for name in PretrainingConfig.__struct_fields__ if name != "epochs"),
        reads=lambda teacher: teacher.pretraining.epochs > 0,
        why="nothing is read before the alignment",
        remedy="set teacher.pretraining.epochs above 0",
    ),
    _Reader(
        keys=("pretraining.glossary",),
        reads=lambda teacher: teacher.pretraining.term_weight > 0,
        why="no term is asked for",
        remedy="set teacher.pretraining.term_weight above 0",
    ),
    _Reader(
        keys=("pretraining.name_model",),
        reads=lambda teacher: teacher.pretraining.deidentify == "presidio",
        why="no model finds names",
        remedy='set teacher.pretraining.deidentify = "presidio"',
    ),
)


#: Keys of the data that are of the icons alone.
_OF_ICONS = ("labelled", "target", "inductive_fraction", "categories", "language")


def require_heard(recipe: Recipe) -> None:
    """Raise UserError for a key that nothing would read, or that another contradicts.

    A key that has its default value is taken for one that was not set.
    """
    require_heard_data(recipe.data)
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
    together = any(student.losses.weights().values())
    if student.frozen_blocks not in (0, StudentConfig().frozen_blocks) and (patch or not student.inherit):
        why = f"the image tower of {student.size} inherits none" if patch else "student.inherit is empty"
        raise UserError(
            f"student.frozen_blocks is {student.frozen_blocks} and {why}; leave it out, or set "
            f"{'student.size to edge-s' if patch else 'student.inherit to efficientnet-lite0'}"
        )
    if student.losses.steps != LossesConfig().steps and not together:
        raise UserError(
            f"student.losses.steps is {student.losses.steps} and no loss has a weight, so towers learn by "
            f"themselves; set one of {', '.join(student.losses.weights())} above 0, or leave it out"
        )
    if student.image_target == "each" and student.views > views:
        raise UserError(
            f"student.image_target is 'each', and the teacher has {views} views where student.views is "
            f"{student.views}; set student.views to at most {views}, or teacher.views to {student.views}"
        )
    reranker = RerankerConfig()
    if not recipe.reranker.enabled and recipe.reranker != reranker:
        changed = (name for name in reranker.__struct_fields__ if name != "enabled")
        key = next(name for name in changed if getattr(recipe.reranker, name) != getattr(reranker, name))
        raise UserError(
            f"reranker.{key} is {getattr(recipe.reranker, key)!r} and there is no re-ranker; "
            "set reranker.enabled = true, or leave it out"
        )
    if recipe.reranker.enabled and min(recipe.reranker.negatives, recipe.reranker.candidates) < 2:
        raise UserError(
            "a re-ranker learns from and orders several candidates, and one of reranker.negatives "
            f"({recipe.reranker.negatives}) and reranker.candidates ({recipe.reranker.candidates}) is 1; set "
            "both to 2 or more"
        )


def unread_passes(student: StudentConfig) -> tuple[str, ...]:
    """Return the keys of a student, other than their defaults, that no training of towers together reads.

    They are no mistake, as shipped recipes set one of them: who adds ``losses`` is to know what that leaves.
    """
    if not any(student.losses.weights().values()):
        return ()
    alone = StudentConfig()
    return tuple(f"student.{name}" for name in _PASSES if getattr(student, name) != getattr(alone, name))


def require_heard_data(data: DataConfig) -> None:
    """Raise UserError for a path that nothing would read: icons would be built in place of one's own."""
    if data.source == "icons" and data.path is not None:
        raise UserError(
            f"data.path is {data.path} and data.source is 'icons', which are no files of yours; "
            'set data.source to "folder" or "parquet", or leave data.path out'
        )


def unread_data(data: DataConfig) -> tuple[str, ...]:
    """Return the keys of one's own data, other than their defaults, that are of the icons alone.

    They are no mistake, as a recipe that sets some may be given other data.
    """
    if data.source == "icons":
        return ()
    icons = DataConfig()
    return tuple(f"data.{name}" for name in _OF_ICONS if getattr(data, name) != getattr(icons, name))


def require_heard_teacher(teacher: TeacherConfig) -> None:
    """Raise UserError for a key of the teacher that nothing would read, or that another one forbids."""
    require_shared(teacher.multitask)
    defaults = TeacherConfig()
    for reader in _READERS:
        for key in () if reader.reads(teacher) else reader.keys:
            value = attrgetter(key)(teacher)
            if value != attrgetter(key)(defaults):
                shown = list(value) if isinstance(value, tuple) else value
                raise UserError(
                    f"teacher.{key} is {shown!r} and {reader.why}; {reader.remedy}, or leave it out"
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
