"""The batches of an alignment: which images, in which view, against which concepts and captions.

Shapes: B batch, C concepts that take part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeglm.train.concepts import Concepts
from edgeglm.train.loop import shuffled, steps_in

#: Concepts contrasted at once; beyond it a step takes those of its batch and a random rest.
MAX_CONCEPTS = 4096
#: Of them, at most so many are of one's own where others are replayed.
_OWN_SHARE = 0.75


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step: images with the view of each, their concepts, and the caption drawn for each concept.

    ``concept_B`` counts within ``chosen_C``, the concepts that take part; ``place_B`` within the images that
    train.
    """

    place_B: Tensor
    image_B: Tensor
    view_B: Tensor
    concept_B: Tensor
    chosen_C: Tensor
    caption_C: Tensor


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Images that a share of each batch is drawn from, besides those that a pass goes through.

    Attributes:
        first: Images from this index on are replayed, those before it are one's own.
        concepts: How many concepts are one's own: the first ones.
        share: Of a batch.
    """

    first: int
    concepts: int
    share: float

    def own(self, size: int) -> int:
        """Return how many of a batch are one's own, at least one."""
        return max(1, size - round(size * self.share))

    def others(self, own: int, size: int) -> int:
        """Return how many are replayed beside ``own`` of one's own, at least one if any share is.

        A batch that one's own images do not fill is short of others too.
        """
        whole = size - self.own(size)
        return min(whole, max(1, round(whole * own / self.own(size))))


def batches_of(
    concepts: Concepts, *, size: int, views: int, rng: np.random.Generator, replay: Replay | None = None
) -> Iterator[Batch]:
    """Yield one pass over the images: all of them, or one's own with as many others as are replayed."""
    seed = int(rng.integers(1 << 31))
    if replay is None:
        for chosen in shuffled(len(concepts.image_N), size, seed=seed):
            yield drawn_batch(concepts, chosen, views=views, rng=rng)
        return
    others = concepts.image_N >= replay.first
    place_own, place_other = torch.nonzero(~others)[:, 0], torch.nonzero(others)[:, 0]
    for chosen in shuffled(len(place_own), replay.own(size), seed=seed):
        count = min(replay.others(len(chosen), size), len(place_other))
        more = rng.choice(len(place_other), count, replace=False)
        places = torch.cat([place_own[chosen], place_other[torch.from_numpy(more)]])
        yield drawn_batch(concepts, places, views=views, rng=rng, own=replay.concepts)


def batches_in_pass(concepts: Concepts, size: int, replay: Replay | None = None) -> int:
    """Return how many batches :func:`batches_of` yields."""
    if replay is None:
        return steps_in(len(concepts.image_N), size)
    return steps_in(int((concepts.image_N < replay.first).sum()), replay.own(size))


def drawn_batch(
    concepts: Concepts, chosen: Tensor, *, views: int, rng: np.random.Generator, own: int = 0
) -> Batch:
    """Draw the other concepts, the first ``own`` of them before the rest, a view and a caption of each."""
    concept_B = concepts.concept_N[chosen]
    chosen_C = _taking_part(concept_B, len(concepts), rng, own=own)
    said_C = [concepts.captions[c] for c in chosen_C.tolist()]
    return Batch(
        place_B=chosen,
        image_B=concepts.image_N[chosen],
        view_B=torch.from_numpy(rng.integers(0, views, len(chosen))),
        concept_B=torch.searchsorted(chosen_C, concept_B),
        chosen_C=chosen_C,
        caption_C=torch.tensor([captions[int(rng.integers(len(captions)))] for captions in said_C]),
    )


def _taking_part(concept_B: Tensor, count: int, rng: np.random.Generator, *, own: int = 0) -> Tensor:
    """Return ascending concepts: all of them, or the batch's with random others.

    Names of one's own domain are told apart by each other: where most concepts are not one's own, those that
    are come first.
    """
    if count <= MAX_CONCEPTS:
        return torch.arange(count)
    near = min(own, int(_OWN_SHARE * MAX_CONCEPTS))
    drawn = [rng.choice(own, near, replace=False)] if near else []
    drawn.append(own + rng.choice(count - own, min(count - own, MAX_CONCEPTS - near), replace=False))
    others = torch.from_numpy(np.concatenate(drawn))
    everyone: Tensor = torch.unique(torch.cat([concept_B, others]))
    return everyone
