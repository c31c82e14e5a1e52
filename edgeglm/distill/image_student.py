"""The image student: trained end to end on cached teacher embeddings, labelled and unlabelled images alike.

Shapes: V views, N images, K concepts, B batch, R resolution, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import StudentConfig
from edgeglm.data.pairs import PairSet
from edgeglm.distill.distance import from_teacher
from edgeglm.models.efficientnet_lite import lite0_trunk
from edgeglm.models.projection import normalized
from edgeglm.models.reparameterised import branch, merge
from edgeglm.models.student_shapes import student_shape
from edgeglm.models.students import ImageTower, StudentImageTower, student_image_tower
from edgeglm.train.checkpoint import Carried, CarriedBuffers
from edgeglm.train.loop import FitOptions, Group, fit, shuffled, steps_in
from edgeglm.train.memory import memory_advice
from edgeglm.train.validation import Validation, held_back
from edgeglm.train.views import Views

if TYPE_CHECKING:
    from edgeglm.distill.student_stage import Keeper

MIN_STEPS = 300
_BLOCK = 256  # images distorted at once


def image_student(
    config: StudentConfig, *, embedding_dim: int, inherit: Mapping[str, Tensor] | None
) -> ImageTower:
    """Make the tower; a convolutional one's trunk has the published weights of Lite0 if given."""
    shape = student_shape(config.size)
    tower = student_image_tower(shape, resolution=config.resolution, embedding_dim=embedding_dim)
    if inherit is not None and isinstance(tower, StudentImageTower):
        taps = (shape.blocks - 1,)
        tower.trunk = lite0_trunk(inherit, blocks=shape.blocks, taps=taps)
    return tower


def frozen_blocks(tower: ImageTower, config: StudentConfig) -> int | None:
    """Return how many blocks stay as they were inherited; None where nothing was."""
    if not config.inherit or not isinstance(tower, StudentImageTower):
        return None
    return min(config.frozen_blocks, len(tower.trunk.blocks) - 1)


class TrainedPart:
    """What of an image tower is trained, and how it goes on from what was cached.

    While the body runs, the frozen blocks are in eval mode, and with ``config.branches`` those behind them
    have branches; they are merged at its end.
    """

    def __init__(self, tower: ImageTower, config: StudentConfig) -> None:
        self._tower, self._branches = tower, config.branches
        self.frozen = frozen_blocks(tower, config)

    def __enter__(self) -> TrainedPart:
        """Prepare the tower for training."""
        tower = self._tower
        tower.train()
        if isinstance(tower, StudentImageTower):
            if self._branches:
                branch(tower.trunk, self.frozen or 0)
            for module in tower.trunk.part(self.frozen) if self.frozen is not None else []:
                module.requires_grad_(False)
                module.eval()
        tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the plain tower in eval mode."""
        self._tower.eval()
        if isinstance(self._tower, StudentImageTower):
            merge(self._tower.trunk)
        self._tower.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return what is trained."""
        return [parameter for parameter in self._tower.parameters() if parameter.requires_grad]

    def __call__(self, cached_B: Tensor) -> Tensor:
        """Return embeddings [B, D] of what :func:`front_activations` gave."""
        x = cached_B.float().contiguous(memory_format=torch.channels_last)
        if self.frozen is None or not isinstance(self._tower, StudentImageTower):
            whole: Tensor = self._tower(x)
            return whole
        return self._tower.head(self._tower.trunk.rest(x, self.frozen)[0])


def require_several(tower: ImageTower, images: int) -> None:
    """Check that batch norms have more than one value a channel in a batch of so many images.

    Raises:
        UserError: A single image leaves one value, whose deviation is nothing.
    """
    if images > 1 or not isinstance(tower, StudentImageTower):
        return
    if tower.project.in_features == tower.squeeze.out_channels:
        raise UserError(
            "the student's last map is one pixel wide, and nothing is learned from one pixel of one image; "
            "raise student.image_batch_size or student.resolution"
        )


def image_targets(teacher_VND: Tensor, config: StudentConfig) -> Tensor:
    """Return what the student is asked for in each of its views: float32 [W, N, D], W of the recipe.

    The mean over the teacher's views is what it says with its noise averaged out: on catalogue names it
    scores 0.03 mAP@10 above the teacher's answer to the plain image. The student, asked for it in every
    view, also learns to answer alike. Beyer et al. (2022) ask for the same view in both; at the few views
    that can be cached here the mean is better.

    Raises:
        UserError: ``image_target = "each"`` with more views than the teacher has.
    """
    views = config.views + 1
    if config.image_target == "mean":
        return normalized(teacher_VND.mean(0)).expand(views, -1, -1)
    if views > len(teacher_VND):
        raise UserError(
            f"student.image_target is 'each', but the teacher has {len(teacher_VND) - 1} views and not "
            f"{config.views}; set student.views to at most {len(teacher_VND) - 1}, or teacher.views higher"
        )
    return teacher_VND[:views]


def fit_image_student(
    tower: ImageTower,
    pairs: PairSet,
    target_VND: Tensor,
    anchor_KD: Tensor,
    concept_N: Tensor,
    config: StudentConfig,
    *,
    seed: int,
    view_seed: int,
    progress: Progress,
    keeper: Keeper | None = None,
    steps: int | None = None,
    images: Tensor | None = None,
) -> list[float]:
    """Train the tower in place and return the mean loss of each epoch.

    Three terms: distance to the teacher's embedding; divergence of the similarities to the concepts'
    texts; and, on labelled images, the label itself.

    Args:
        tower: The student.
        pairs: Labelled and unlabelled images are used, held ones are not.
        target_VND: From :func:`image_targets`; view 0 is the plain image.
        anchor_KD: Teacher embeddings of texts: the names of the concepts first, in their order.
        concept_N: int64, the concept of each image, -1 where training may not know it.
        config: Rates and weights.
        seed: Of the order and the choice of views.
        view_seed: Of the views; with ``image_target = "each"`` the one that the teacher's were made with.
        progress: Shows the steps.
        keeper: Makes the checkpoint.
        steps: How many at least, in place of the recipe's epochs.
        images: int64, ascending: these alone, all of which must be labelled or unlabelled.

    Raises:
        UserError: Memory does not suffice, or a batch; it says what to lower or to raise.
    """
    used = torch.from_numpy(np.sort(pairs.by_role("labelled", "unlabelled"))) if images is None else images
    frozen = frozen_blocks(tower, config)
    tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it
    front_VU = front_activations(
        tower, pairs, used, len(target_VND), frozen, resolution=config.resolution, seed=view_seed
    )
    target_VUD, concept_U = target_VND[:, used], concept_N[used]

    trained_T = validated_W = torch.arange(len(used))
    if config.patience:
        trained_T, validated_W = held_back(len(used), seed=seed)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng((seed, 2, epoch))
        for chosen in shuffled(len(trained_T), config.image_batch_size, seed=int(rng.integers(1 << 31))):
            yield torch.from_numpy(rng.integers(0, len(front_VU), len(chosen))), trained_T[chosen]

    def distance_of(student_BD: Tensor, target_BD: Tensor) -> Tensor:
        return from_teacher(student_BD, target_BD, anchor_KD, config)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        view_B, chosen_B = batch
        student_BD = part(front_VU[view_B, chosen_B])
        loss, concept_B = distance_of(student_BD, target_VUD[view_B, chosen_B]), concept_U[chosen_B]
        known = concept_B >= 0
        if config.label_weight and bool(known.any()):
            scores_LK = student_BD[known] @ anchor_KD.T / config.temperature
            loss = loss + config.label_weight * F.cross_entropy(scores_LK, concept_B[known])
        return loss

    def validated() -> float:
        count = len(validated_W)
        parts = [validated_W[start : start + _BLOCK] for start in range(0, count, _BLOCK)]
        losses = [distance_of(part(front_VU[0, one]), target_VUD[0, one]) for one in parts]
        return sum(float(loss) * len(one) for loss, one in zip(losses, parts, strict=True)) / count

    require_several(tower, min(len(trained_T), config.image_batch_size))
    per_epoch = steps_in(len(trained_T), config.image_batch_size)
    epochs = max(config.image_epochs, -(-MIN_STEPS // per_epoch)) if steps is None else -(-steps // per_epoch)
    with TrainedPart(tower, config) as part:
        carried: list[Carried] = [CarriedBuffers(tower)]
        watch = Validation(tower, validated, patience=config.patience) if config.patience else None
        if watch is not None:
            carried.append(watch)
        return fit(
            [
                Group(
                    parameters=part.parameters(),
                    learning_rate=config.image_learning_rate,
                    weight_decay=config.weight_decay,
                )
            ],
            batches,
            loss_of,
            epochs=epochs,
            steps_per_epoch=per_epoch,
            warmup=50,
            title="Student: image tower",
            progress=progress,
            options=FitOptions(
                validation=watch,
                checkpoint=None if keeper is None else keeper(carried),
                lower="student.image_batch_size",
                rate="student.image_learning_rate",
            ),
        )


@memory_advice("Student: the views of its images", "student.views or student.resolution")
@torch.no_grad()
def front_activations(
    tower: ImageTower,
    pairs: PairSet,
    used: Tensor,
    views: int,
    frozen: int | None,
    *,
    resolution: int,
    seed: int,
) -> Tensor:
    """Return what the trained part of the tower takes, for every view of the used images.

    With ``frozen`` blocks their activation, float16 [V, U, C, H, W]: it never changes, so it is made
    once. Without any, the pixels, float16 [V, U, 3, R, R].

    Raises:
        UserError: Memory does not suffice; it says what to lower.
    """
    drawn = Views(pairs, views, seed=seed, resolution=resolution)
    tower.eval()
    out: Tensor | None = None
    for start in range(0, len(used), _BLOCK):
        chosen = used[start : start + _BLOCK]
        for view, x in enumerate(drawn.every(chosen)):
            if frozen is not None and isinstance(tower, StudentImageTower):
                x = tower.trunk.front(x.contiguous(memory_format=torch.channels_last), frozen)
            if out is None:
                out = torch.empty(views, len(used), *x.shape[1:], dtype=torch.float16)
            out[view, start : start + len(chosen)] = x.half()
    assert out is not None
    return out
