"""The text student: a shallow Transformer whose vocabulary starts from the teacher's.

Shapes: W entries of the vocabulary, E factor, T texts, L tokens, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgeglm.core.progress import Progress
from edgeglm.core.recipe import StudentConfig
from edgeglm.data.tokenization import Ids, Tokenizer
from edgeglm.distill.distance import from_text_teacher
from edgeglm.models.student_shapes import student_shape
from edgeglm.models.students import StudentTextTower
from edgeglm.train.checkpoint import Carried, CarriedBuffers
from edgeglm.train.loop import FitOptions, Group, fit, steps_in
from edgeglm.train.validation import Validation, held_back

if TYPE_CHECKING:
    from edgeglm.distill.student_stage import Keeper

MIN_STEPS = 600
_BATCHES_SORTED = 8


def text_student(config: StudentConfig, *, embedding_dim: int, words_WD: Tensor) -> StudentTextTower:
    """Make the tower, its vocabulary started from what the teacher says to each entry alone.

    The principal components of those embeddings put a word where the teacher puts it, so that a text
    begins as the mean of its words. Components of the teacher's own input table, which know nothing
    of its layers, leave the student further off: cosine 0.78 against 0.84 on unseen queries.
    """
    shape = student_shape(config.size)
    tower = StudentTextTower(
        shape, vocabulary=len(words_WD), max_length=config.max_length, embedding_dim=embedding_dim
    )
    count = min(shape.factor, words_WD.shape[1])
    with torch.no_grad():
        tower.tokens.weight[:, :count] = principal_components(words_WD, count)
    return tower


def principal_components(table_WD: Tensor, count: int) -> Tensor:
    """Return the first ``count`` principal components of the rows, scaled to unit deviation: [W, count]."""
    centred = table_WD.double() - table_WD.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    basis = vectors[:, values.argsort(descending=True)[:count]]
    largest = basis[basis.abs().argmax(0), torch.arange(count)]
    found = centred @ (basis * torch.sign(largest))  # an eigenvector's own sign is arbitrary
    scaled: Tensor = (found / found.std()).float()
    return scaled


def fit_text_student(
    tower: StudentTextTower,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    teacher_TD: Tensor,
    anchor_KD: Tensor,
    config: StudentConfig,
    *,
    captions: int,
    seed: int,
    progress: Progress,
    keeper: Keeper | None = None,
    steps: int | None = None,
) -> list[float]:
    """Train the tower in place and return the mean loss of each epoch.

    Args:
        tower: The student.
        tokenizer: The teacher's own.
        texts: What the teacher embedded; the first ``captions`` are the domain's and come several times
            an epoch, the others by turns, half of them or as many as the captions.
        teacher_TD: The teacher's embeddings of the texts.
        anchor_KD: Teacher embeddings of images, one mean for each concept, to compare similarities with.
        config: Rates and weights.
        captions: How many of the texts are captions.
        seed: Of the order.
        progress: Shows the steps.
        keeper: Makes the checkpoint.
        steps: How many at least, in place of the recipe's epochs.

    Raises:
        UserError: Memory does not suffice; it says what to lower.
    """
    encoded = [tokenizer.encode([text], max_length=config.max_length)[0][0] for text in texts]
    lengths = np.array([len(row) for row in encoded])
    caption_C, phrase_P = np.arange(captions), np.arange(captions, len(texts))
    validated_W = torch.arange(0)
    if config.patience:  # phrases are held back; captions where there are none
        pool = phrase_P if len(phrase_P) else caption_C
        trained, apart = held_back(len(pool), seed=seed)
        validated_W = torch.from_numpy(pool)[apart]
        if len(phrase_P):
            phrase_P = pool[trained.numpy()]
        else:
            caption_C = pool[trained.numpy()]
    rest = len(phrase_P)
    repeated = len(caption_C) * config.caption_repeats
    per_epoch = repeated + min(rest, max(repeated, rest // 2))

    def batches(epoch: int) -> Iterator[Tensor]:
        rng = np.random.default_rng((seed, 3, epoch))
        others = phrase_P[rng.permutation(rest)[: per_epoch - repeated]]
        pool = np.concatenate([np.tile(caption_C, config.caption_repeats), others])
        yield from length_batches(pool, lengths, config.text_batch_size, rng)

    def loss_of(chosen: Tensor) -> Tensor:
        ids, mask = padded([encoded[i] for i in chosen.tolist()], tokenizer.pad_id)
        return from_text_teacher(tower(ids, mask), teacher_TD[chosen], anchor_KD, config)

    def validated() -> float:
        size, count = config.text_batch_size, len(validated_W)
        parts = [validated_W[start : start + size] for start in range(0, count, size)]
        return sum(float(loss_of(chosen)) * len(chosen) for chosen in parts) / count

    steps_per_epoch = steps_in(per_epoch, config.text_batch_size)
    least = max(config.text_epochs, -(-MIN_STEPS // steps_per_epoch))
    carried: list[Carried] = [CarriedBuffers(tower)]
    watch = Validation(tower, validated, patience=config.patience) if config.patience else None
    if watch is not None:
        carried.append(watch)
    tower.train()
    curve = fit(
        [
            Group(
                parameters=list(tower.parameters()),
                learning_rate=config.text_learning_rate,
                weight_decay=config.weight_decay,
            )
        ],
        batches,
        loss_of,
        epochs=least if steps is None else -(-steps // steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        warmup=50,
        clip=1.0,
        title="Student: text tower",
        progress=progress,
        options=FitOptions(
            validation=watch,
            checkpoint=None if keeper is None else keeper(carried),
            lower="student.text_batch_size",
            rate="student.text_learning_rate",
        ),
    )
    tower.eval()
    return curve


def length_batches(pool: Ids, lengths: Ids, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield batches int64 [size] of similar length in random order; a short rest is left out.

    Padding to the longest of a random batch would triple the tokens. Texts are shuffled first and
    sorted only within stretches of some batches, so that batches differ from epoch to epoch.
    """
    order = rng.permutation(pool)
    if len(order) <= size:
        yield torch.from_numpy(order)
        return
    stretch = size * _BATCHES_SORTED
    ordered = [
        part[np.argsort(lengths[part], kind="stable")]
        for part in (order[start : start + stretch] for start in range(0, len(order), stretch))
    ]
    flat = np.concatenate(ordered)
    batches = [flat[start : start + size] for start in range(0, len(flat) - size + 1, size)]
    for place in rng.permutation(len(batches)).tolist():
        yield torch.from_numpy(batches[place])


def padded(
    rows: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.int64]]], pad: int
) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 [B, L], of rows of ids."""
    ids = np.full((len(rows), max(map(len, rows))), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
