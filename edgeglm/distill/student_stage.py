"""What the stages of students have in common: their configuration, their key, and a training that goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from edgeglm.core.recipe import StudentConfig
from edgeglm.core.stage import Context, Inputs, Stage

if TYPE_CHECKING:
    from edgeglm.train.checkpoint import Carried, Checkpoint

    #: What else a loop changes -> its checkpoint.
    Keeper = Callable[[Sequence[Carried]], Checkpoint | None]

CODE = (
    "edgeglm.distill",
    "edgeglm.data.tokenization",
    "edgeglm.data.transforms",
    "edgeglm.data.vocabulary",
    "edgeglm.train",
    "edgeglm.models.students",
    "edgeglm.models.student_shapes",
    "edgeglm.models.efficientnet_lite",
    "edgeglm.models.heirs",
    "edgeglm.models.hf_towers",
    "edgeglm.models.packed_text",
    "edgeglm.models.pretrained_hf",
    "edgeglm.models.projection",
    "edgeglm.models.published",
    "edgeglm.models.reparameterised",
)
#: The keys of a recipe's ``student`` that one tower alone reads; ``corpus`` is of the targets.
_ONE_TOWERS: dict[str, tuple[str, ...]] = {
    "image": (
        "inherit",
        "frozen_blocks",
        "resolution",
        "views",
        "image_target",
        "image_epochs",
        "image_batch_size",
        "image_learning_rate",
        "label_weight",
        "anchors",
        "branches",
    ),
    "text": (
        "max_length",
        "caption_repeats",
        "text_epochs",
        "text_batch_size",
        "text_learning_rate",
        "text_relation",
        "vocabulary",
    ),
    "targets": ("corpus",),
}
LIBRARIES = ("torch", "numpy", "pillow", "tokenizers", "safetensors")


class StudentStageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tower's part of the recipe, the seeds of the order and of the teacher's views, and the text teacher.

    ``teacher`` is empty for students that inherit nothing of it.
    """

    student: StudentConfig
    seed: int
    view_seed: int
    teacher: str = ""

    @classmethod
    def of(
        cls, tower: Literal["image", "text"], student: StudentConfig, *, seed: int, teacher: str = ""
    ) -> StudentStageConfig:
        """Return the configuration of one tower.

        What only the other tower reads has its default value, so that a change of it trains one tower anew.
        """
        defaults, ours = StudentConfig(), _ONE_TOWERS[tower]
        others = {
            name: getattr(defaults, name)
            for keys in _ONE_TOWERS.values()
            for name in keys
            if name not in ours
        }
        student = msgspec.structs.replace(student, **others)
        return cls(student=student, seed=seed, view_seed=seed, teacher=teacher)


class StudentStage(Stage[StudentStageConfig]):
    """A stage that trains a student. How often its state is kept is no part of its key."""

    code: ClassVar[tuple[str, ...]] = CODE
    libraries: ClassVar[tuple[str, ...]] = LIBRARIES

    def key_parts(self, inputs: Inputs) -> dict[str, Any]:
        """Leave out what changes no student."""
        parts = super().key_parts(inputs)
        del parts["config"]["student"]["checkpoint_epochs"]
        return parts

    @contextmanager
    def keeping(self, inputs: Inputs, context: Context) -> Iterator[Keeper]:
        """Give what makes the training's checkpoint, in the store under the stage's key.

        What was kept goes when the body is done; it stays where the body was cut off.
        """
        from edgeglm.train.checkpoint import Checkpoint

        key, every = self.key(inputs), self.config.student.checkpoint_epochs
        folder = context.store.checkpoints / key

        def of(carried: Sequence[Carried]) -> Checkpoint | None:
            if not every:
                return None
            path = folder / f"{self.name}.pt"
            return Checkpoint(path=path, identity=key, every=every, carried=carried)

        yield of
        shutil.rmtree(folder, ignore_errors=True)
