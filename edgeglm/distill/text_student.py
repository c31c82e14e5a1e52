"""The text student: a shallow Transformer whose vocabulary starts from the teacher's.

Shapes: W words of the vocabulary, H the teacher's width, E factor, T texts, L tokens, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from edgeglm.core.progress import Progress
from edgeglm.core.recipe import StudentConfig
from edgeglm.data.tokenization import Tokenizer
from edgeglm.models.students import StudentTextTower, student_shape
from edgeglm.train.loop import Group, fit, shuffled, steps_in
from edgeglm.train.losses import embedding_distance, similarity_divergence

MIN_STEPS = 600
#: The inherited vocabulary is good already: it moves slower than the rest.
_TOKEN_RATE = 0.3


def text_student(
    config: StudentConfig, *, vocabulary: int, embedding_dim: int, tokens_WH: Tensor | None
) -> StudentTextTower:
    """Make the tower; its vocabulary holds the principal components of the teacher's, if given."""
    shape = student_shape(config.size)
    tower = StudentTextTower(
        shape, vocabulary=vocabulary, max_length=config.max_length, embedding_dim=embedding_dim
    )
    if tokens_WH is not None and len(tokens_WH) <= vocabulary and tokens_WH.shape[1] >= shape.factor:
        with torch.no_grad():
            tower.tokens.weight.normal_(std=1e-2)
            tower.tokens.weight[: len(tokens_WH)] = principal_components(tokens_WH, shape.factor)
    return tower


def principal_components(table_WH: Tensor, count: int) -> Tensor:
    """Return the first ``count`` principal components of the rows, scaled to unit deviation: [W, count]."""
    centred = table_WH.double() - table_WH.double().mean(0)
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
) -> list[float]:
    """Train the tower in place and return the mean loss of each epoch.

    Args:
        tower: The student.
        tokenizer: The teacher's own.
        texts: What the teacher embedded; the first ``captions`` are the domain's and come every epoch,
            the others by turns, as many again and at least half of the rest.
        teacher_TD: The teacher's embeddings of the texts.
        anchor_KD: Teacher embeddings of images, one mean for each concept, to compare similarities with.
        config: Rates and weights.
        captions: How many of the texts are captions.
        seed: Of the order.
        progress: Shows the steps.
    """
    encoded = [tokenizer.encode([text], max_length=config.max_length)[0][0] for text in texts]
    rest = len(texts) - captions
    per_epoch = captions + min(rest, max(captions, rest // 2))

    def batches(epoch: int) -> Iterator[Tensor]:
        rng = np.random.default_rng((seed, 3, epoch))
        others = captions + rng.permutation(rest)[: per_epoch - captions]
        pool = torch.from_numpy(np.concatenate([np.arange(captions), others]))
        for chosen in shuffled(len(pool), config.text_batch_size, seed=int(rng.integers(1 << 31))):
            yield pool[chosen]

    def loss_of(chosen: Tensor) -> Tensor:
        ids, mask = padded([encoded[i] for i in chosen.tolist()], tokenizer.pad_id)
        student_BD, teacher_BD = tower(ids, mask), teacher_TD[chosen]
        loss = config.distance_weight * embedding_distance(student_BD, teacher_BD)
        return loss + similarity_divergence(student_BD, teacher_BD, anchor_KD, temperature=config.temperature)

    steps = steps_in(per_epoch, config.text_batch_size)
    tower.train()
    tokens = list(tower.tokens.parameters())
    known = {id(parameter) for parameter in tokens}
    others = [parameter for parameter in tower.parameters() if id(parameter) not in known]
    rate = config.text_learning_rate
    curve = fit(
        [
            Group(parameters=tokens, learning_rate=rate * _TOKEN_RATE),
            Group(parameters=others, learning_rate=rate, weight_decay=config.weight_decay),
        ],
        batches,
        loss_of,
        epochs=max(config.text_epochs, -(-MIN_STEPS // steps)),
        steps_per_epoch=steps,
        warmup=50,
        clip=1.0,
        title="Student: text tower",
        progress=progress,
    )
    tower.eval()
    return curve


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
