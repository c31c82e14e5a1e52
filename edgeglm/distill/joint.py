"""Both student towers in one step, by any sum of named terms: how methods of distillation are compared.

The recipe trains each tower by itself against cached rows, which lets each have batches of its own.
Terms that compare the student's towers with *each other* (labels, relations, affinities, gradients) need
both at once.

Shapes: V views, U images used, B images of a step, T texts of a step, K concepts, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import StudentConfig
from edgeglm.data.tokenization import Tokenizer
from edgeglm.distill.image_student import TrainedPart, require_several
from edgeglm.distill.text_student import padded
from edgeglm.models.students import ImageTower, StudentTextTower
from edgeglm.train import kd_losses
from edgeglm.train.checkpoint import Carried, CarriedBuffers
from edgeglm.train.concepts import Concepts
from edgeglm.train.loop import FitOptions, Group, fit, steps_in
from edgeglm.train.losses import similarity_divergence
from edgeglm.train.validation import Validation, held_back

if TYPE_CHECKING:
    from edgeglm.distill.student_stage import Keeper


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The weight of each term; 0 leaves it out.

    Attributes:
        labels: ``pair_contrastive`` of the student's own towers.
        feature: ``feature_mse`` of both towers.
        relational: ``contrastive_relational``.
        interactive: ``interactive_contrastive``.
        affinity: ``affinity_mimicking`` with a trained scale.
        logits: ``similarity_divergence`` over the concepts alone.
        gradient: ``gradient_distance``.
        anchors: The same to the teacher's rows of the other modality: all concepts, and
            for images also phrases of ordinary words.
        anchor_labels: Cross-entropy of labelled images among the teacher's texts of all concepts.
    """

    labels: float = 0.0
    feature: float = 0.0
    relational: float = 0.0
    interactive: float = 0.0
    affinity: float = 0.0
    logits: float = 0.0
    gradient: float = 0.0
    anchors: float = 0.0
    anchor_labels: float = 0.0

    def __post_init__(self) -> None:
        """Refuse weights that teach nothing."""
        weights = {field.name: getattr(self, field.name) for field in fields(self)}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise UserError("the terms of distillation have no positive weight; give one of "
                            + ", ".join(weights))  # fmt: skip


#: What the recipe's towers are trained by: 6 (1 - cosine) is 3 squared distances.
RECIPE = Terms(feature=3.0, anchors=1.0, anchor_labels=0.1)
#: The published sum (Yang et al., 2024), their weight of FD at 512 dimensions.
CLIP_KD = Terms(labels=1.0, feature=4.0, relational=1.0, interactive=1.0)


@dataclass(frozen=True, kw_only=True)
class Cached:
    """All that a teacher said once, and what the student's trained layers take.

    Attributes:
        front_VU: The frozen layers' activations, float16 [V, U, C, H, W], or pixels where none is frozen.
        target_VUD: What is asked for in each view of each image, float32 [V, U, D].
        concept_U: int64, -1 where training may not know it.
        concepts: Of the labelled images.
        texts: The captions first, in the order of ``concepts.texts``, then phrases.
        text_TD: The teacher's embeddings of the texts.
        name_KD: Of the concepts' names and of phrases, what images are compared with.
        mean_KD: Mean teacher embedding of each concept's images, what texts are compared with.
    """

    front_VU: Tensor
    target_VUD: Tensor
    concept_U: Tensor
    concepts: Concepts
    texts: Sequence[str]
    text_TD: Tensor
    name_KD: Tensor
    mean_KD: Tensor


@dataclass(frozen=True)
class _Batch:
    view_B: Tensor
    image_B: Tensor
    text_T: Tensor
    concept_T: Tensor  # -1 for phrases


@dataclass(frozen=True)
class _Pool:
    """What batches are drawn from: positions of images, and of phrases among the texts, int64."""

    image_P: Tensor
    phrase_P: Tensor


def fit_towers_together(
    image: ImageTower,
    text: StudentTextTower,
    tokenizer: Tokenizer,
    cached: Cached,
    terms: Terms,
    config: StudentConfig,
    *,
    steps: int,
    captions: int = 96,
    phrases: int = 96,
    seed: int,
    progress: Progress,
    keeper: Keeper | None = None,
) -> list[float]:
    """Train both towers in place and return the mean loss of each stretch of steps.

    A stretch is a quarter of the steps, or, with ``config.patience``, as many as show each image once: after
    each one the same terms are asked of images and phrases that were held back.

    Args:
        image: Its frozen blocks stay as they are.
        text: The text tower.
        tokenizer: The teacher's own.
        cached: What was made once.
        terms: What is asked for.
        config: Batch of images, rates, temperature.
        steps: How many, equal for methods that are compared.
        captions: Of a step: one for each labelled image, filled up with others.
        phrases: Of a step.
        seed: Of order, views and captions.
        progress: Shows the steps.
        keeper: Makes the checkpoint.

    Raises:
        UserError: Memory does not suffice, or a batch; it says what to lower or to raise.
    """
    require_several(image, config.image_batch_size)
    ids = [tokenizer.encode([t], max_length=config.max_length)[0][0] for t in cached.texts]
    scale = nn.Parameter(torch.tensor(1.0 / config.temperature).log())
    trained, apart = _pools(cached, config, seed)

    def batches(epoch: int) -> Iterator[_Batch]:
        rng = np.random.default_rng((seed, 5, epoch))
        for _ in range(per_epoch):
            yield _drawn(cached, config.image_batch_size, captions, phrases, rng, trained)

    def loss_of(batch: _Batch) -> Tensor:
        pictures = part(cached.front_VU[batch.view_B, batch.image_B])
        words = text(*padded([ids[i] for i in batch.text_T.tolist()], tokenizer.pad_id))
        return _loss(pictures, words, batch, cached, terms, config, scale.exp())

    def validated() -> float:
        rng = np.random.default_rng((seed, 6))
        losses = [
            (float(loss_of(batch)), len(batch.image_B))
            for batch in _all_of(apart, cached, config.image_batch_size, captions, phrases, rng)
        ]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)

    per_epoch = max(1, steps // 4)
    carried: list[Carried] = [CarriedBuffers(image), CarriedBuffers(text)]
    watch: Validation | None = None
    if config.patience:
        per_epoch = min(steps, steps_in(len(trained.image_P), config.image_batch_size))
        watch = Validation(nn.ModuleList([image, text]), validated, patience=config.patience)
        carried.append(watch)
    kept = None if keeper is None else keeper(carried)
    if kept is not None and watch is None:
        kept = replace(kept, every=1)  # so few epochs, each a quarter of the training
    text.train()
    with TrainedPart(image, config) as part:
        rates = (
            (part.parameters(), config.image_learning_rate),
            (list(text.parameters()), config.text_learning_rate),
            ([scale], config.image_learning_rate),
        )
        curve = fit(
            [
                Group(parameters=parameters, learning_rate=rate, weight_decay=decay)
                for (parameters, rate), decay in zip(
                    rates, (config.weight_decay, config.weight_decay, 0.0), strict=True
                )
            ],
            batches,
            loss_of,
            epochs=max(1, steps // per_epoch if watch is None else -(-steps // per_epoch)),
            steps_per_epoch=per_epoch,
            warmup=50,
            title="Student: both towers",
            progress=progress,
            options=FitOptions(
                validation=watch,
                checkpoint=kept,
                lower="student.image_batch_size",
                rate="student.image_learning_rate or student.text_learning_rate",
            ),
        )
    text.eval()
    return curve


def _pools(cached: Cached, config: StudentConfig, seed: int) -> tuple[_Pool, _Pool]:
    """Return what trains and what validates: all and nothing apart, unless the recipe has patience."""
    image_P = torch.arange(len(cached.concept_U))
    phrase_P = torch.arange(len(cached.concepts.texts), len(cached.texts))
    whole = _Pool(image_P, phrase_P)
    if not config.patience:
        return whole, whole
    images, phrases = held_back(len(image_P), seed=seed), held_back(len(phrase_P), seed=seed)
    trained, apart = (_Pool(image_P[images[i]], phrase_P[phrases[i]]) for i in (0, 1))
    return trained, apart


def _all_of(
    pool: _Pool, cached: Cached, images: int, captions: int, phrases: int, rng: np.random.Generator
) -> Iterator[_Batch]:
    """Yield batches that show the plain view of each image of a pool once."""
    for start in range(0, len(pool.image_P), images):
        image_B = pool.image_P[start : start + images]
        yield _with_texts(torch.zeros_like(image_B), image_B, cached, captions, phrases, rng, pool)


def _drawn(
    cached: Cached, images: int, captions: int, phrases: int, rng: np.random.Generator, pool: _Pool
) -> _Batch:
    """Draw images, a caption for each labelled one, other captions, and phrases."""
    image_B = pool.image_P[torch.from_numpy(rng.integers(0, len(pool.image_P), images))]
    view_B = torch.from_numpy(rng.integers(0, len(cached.front_VU), images))
    return _with_texts(view_B, image_B, cached, captions, phrases, rng, pool)


def _with_texts(
    view_B: Tensor,
    image_B: Tensor,
    cached: Cached,
    captions: int,
    phrases: int,
    rng: np.random.Generator,
    pool: _Pool,
) -> _Batch:
    own = cached.concepts.captions
    asked = dict.fromkeys(c for c in cached.concept_U[image_B].tolist() if c >= 0)
    for concept in rng.permutation(len(own)).tolist():
        if len(asked) >= captions:
            break
        asked.setdefault(concept)
    chosen = [own[c][int(rng.integers(len(own[c])))] for c in asked]
    rest = len(pool.phrase_P)
    drawn = pool.phrase_P[torch.from_numpy(rng.integers(0, rest, phrases if rest else 0))]
    return _Batch(
        view_B,
        image_B,
        torch.cat([torch.tensor(chosen), drawn]),
        torch.tensor([*asked, *[-1] * len(drawn)]),
    )


def _loss(
    image_BD: Tensor,
    text_TD: Tensor,
    batch: _Batch,
    cached: Cached,
    terms: Terms,
    config: StudentConfig,
    scale: Tensor,
) -> Tensor:
    tau, soft = config.temperature, config.softening
    concept_B = cached.concept_U[batch.image_B]
    positive_BT = (concept_B[:, None] == batch.concept_T) & (concept_B >= 0)[:, None]
    teacher_BD = cached.target_VUD[batch.view_B, batch.image_B]
    teacher_TD = cached.text_TD[batch.text_T]
    both = (image_BD, text_TD, teacher_BD, teacher_TD)
    names_KD = cached.name_KD[: len(cached.concepts)]
    # Labels contrast with captions alone: whether a phrase fits an image nobody has said.
    known = batch.concept_T >= 0
    pairs = (image_BD, text_TD[known], teacher_BD, teacher_TD[known], positive_BT[:, known])
    found: list[Tensor] = []
    if terms.labels:
        found.append(terms.labels * kd_losses.pair_contrastive(pairs[0], pairs[1], pairs[4], temperature=tau))
    if terms.feature:
        distance = kd_losses.feature_mse(image_BD, teacher_BD) + kd_losses.feature_mse(text_TD, teacher_TD)
        found.append(terms.feature * distance)
    if terms.relational:
        found.append(terms.relational * kd_losses.contrastive_relational(*both, temperature=tau))
    if terms.interactive:
        term = kd_losses.interactive_contrastive(*pairs, temperature=tau)
        found.append(terms.interactive * term)
    if terms.affinity:
        term = kd_losses.affinity_mimicking(*both, scale=scale, teacher_temperature=tau)
        found.append(terms.affinity * term)
    if terms.logits:
        term = similarity_divergence(image_BD, teacher_BD, names_KD, temperature=tau, softening=soft)
        term = term + similarity_divergence(
            text_TD, teacher_TD, cached.mean_KD, temperature=tau, softening=soft
        )
        found.append(terms.logits * term)
    if terms.gradient:
        term = kd_losses.gradient_distance(*pairs, temperature=tau)
        found.append(terms.gradient * term)
    if terms.anchors:
        term = similarity_divergence(image_BD, teacher_BD, cached.name_KD, temperature=tau, softening=soft)
        term = term + similarity_divergence(
            text_TD, teacher_TD, cached.mean_KD, temperature=tau, softening=soft
        )
        found.append(terms.anchors * term)
    labelled = concept_B >= 0
    if terms.anchor_labels and bool(labelled.any()):
        scores_LK = image_BD[labelled] @ cached.name_KD.T / tau
        found.append(terms.anchor_labels * F.cross_entropy(scores_LK, concept_B[labelled]))
    return torch.stack(found).sum()
