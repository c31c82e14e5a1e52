"""Quantization-aware distillation: a student goes on learning from the cached targets while it is rounded.

The remedy for a student that INT8 costs too much: the loss is that of its training, the targets are the
teacher's own and not the FP32 student's, so that what rounding took can be made up for elsewhere (QAT with
distillation: Polino et al., 2018; Mishra and Marr, Apprentice, 2018). Batch norms keep their statistics.

Shapes: V views, N images, T texts, K concepts, B batch, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.core.progress import Progress
from edgeglm.core.recipe import StudentConfig
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.distill.distance import from_teacher, from_text_teacher
from edgeglm.distill.text_student import padded
from edgeglm.models.students import ImageTower, StudentTextTower
from edgeglm.train.fake_quantization import Rounding, fake_quantized
from edgeglm.train.loop import FitOptions, Group, fit, stretch_of
from edgeglm.train.views import Views

B = TypeVar("B")
#: Of the student's own rate: it is near its end, and large steps would leave it.
RATE = 0.1
_STRETCH = 25  # most steps between two losses in the curve
_CALIBRATED = 8  # batches that ranges are found on
_APART = 1 << 20  # the epoch that those are drawn as


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What the towers were taught with.

    Attributes:
        pairs: Labelled and unlabelled images are used, held ones are not.
        target_ND: What the image tower is asked for in every view.
        name_KD: The teacher's embeddings of texts, the concepts' names first.
        concept_N: int64, -1 where training may not know it.
        texts: What the teacher embedded, the first ``captions`` of them the domain's.
        text_TD: The teacher's embeddings of them.
        mean_KD: The teacher's mean embedding of each concept's images.
    """

    pairs: PairSet
    target_ND: Tensor
    name_KD: Tensor
    concept_N: Tensor
    texts: Sequence[str]
    captions: int
    text_TD: Tensor
    mean_KD: Tensor


def tune_image(
    tower: ImageTower,
    taught: Taught,
    config: StudentConfig,
    *,
    steps: int,
    seed: int,
    progress: Progress,
    rounding: Rounding | None = None,
) -> list[float]:
    """Train an image tower in place, rounded, for some steps; return the mean loss of each stretch."""
    pairs = taught.pairs
    used = torch.from_numpy(np.sort(pairs.by_role("labelled", "unlabelled")))
    drawn = Views(pairs, config.views + 1, seed=seed, resolution=config.resolution)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng((seed, 6, epoch))
        for _ in range(_CALIBRATED if epoch == _APART else stretch_of(steps, _STRETCH)):
            chosen = used[torch.from_numpy(rng.integers(0, len(used), config.image_batch_size))]
            yield drawn.one(int(rng.integers(len(drawn))), chosen), chosen

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, chosen = batch
        student_BD, concept_B = tower(pixels), taught.concept_N[chosen]
        loss = from_teacher(student_BD, taught.target_ND[chosen], taught.name_KD, config)
        known = concept_B >= 0
        if config.label_weight and bool(known.any()):
            scores_LK = student_BD[known] @ taught.name_KD.T / config.temperature
            loss = loss + config.label_weight * F.cross_entropy(scores_LK, concept_B[known])
        return loss

    return _fit(
        tower,
        batches,
        lambda batch: tower(batch[0]),
        loss_of,
        rounding,
        name="image",
        rate=config.image_learning_rate,
        decay=config.weight_decay,
        steps=steps,
        progress=progress,
    )


def tune_text(
    tower: StudentTextTower,
    tokenizer: Tokenizer,
    taught: Taught,
    config: StudentConfig,
    *,
    steps: int,
    seed: int,
    progress: Progress,
    rounding: Rounding | None = None,
) -> list[float]:
    """Train a text tower in place, rounded; half of each batch are captions."""
    limit, count = len(tower.places), len(taught.texts)
    encoded = [tokenizer.encode([text], max_length=limit)[0][0] for text in taught.texts]

    def batches(epoch: int) -> Iterator[Tensor]:
        rng = np.random.default_rng((seed, 7, epoch))
        for _ in range(_CALIBRATED if epoch == _APART else stretch_of(steps, _STRETCH)):
            caption = rng.integers(0, taught.captions, config.text_batch_size)
            any_of = rng.integers(0, count, config.text_batch_size)
            first = rng.random(config.text_batch_size) < 0.5
            yield torch.from_numpy(np.where(first, caption, any_of).astype(np.int64))

    def embedded(chosen: Tensor) -> Tensor:
        found: Tensor = tower(*padded([encoded[i] for i in chosen.tolist()], tokenizer.pad_id))
        return found

    def loss_of(chosen: Tensor) -> Tensor:
        return from_text_teacher(embedded(chosen), taught.text_TD[chosen], taught.mean_KD, config)

    return _fit(
        tower,
        batches,
        embedded,
        loss_of,
        rounding,
        name="text",
        rate=config.text_learning_rate,
        decay=config.weight_decay,
        steps=steps,
        progress=progress,
    )


def _fit(
    tower: nn.Module,
    batches: Callable[[int], Iterable[B]],
    embedded: Callable[[B], Tensor],
    loss_of: Callable[[B], Tensor],
    rounding: Rounding | None,
    *,
    name: Literal["image", "text"],
    rate: float,
    decay: float,
    steps: int,
    progress: Progress,
) -> list[float]:
    """Find ranges on some batches, then train a tower rounded by them."""

    def calibrate() -> None:
        for batch in batches(_APART):
            embedded(batch)

    tower.eval()
    with fake_quantized(tower, calibrate, rounding):
        return fit(
            [Group(parameters=list(tower.parameters()), learning_rate=RATE * rate, weight_decay=decay)],
            batches,
            loss_of,
            epochs=steps // stretch_of(steps, _STRETCH),
            steps_per_epoch=stretch_of(steps, _STRETCH),
            clip=1.0,
            title=f"Quantization-aware: {name} tower",
            progress=progress,
            options=FitOptions(
                lower=f"student.{name}_batch_size, or set quantize.qat_steps to 0",
                rate=f"student.{name}_learning_rate, or set quantize.qat_steps to 0",
            ),
        )
