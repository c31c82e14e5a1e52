"""The labelled part of the pairs by concept: what a teacher is aligned on and a student compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeglm.core.errors import UserError
from edgeglm.data.pairs import PairSet


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """The labelled part of the pairs, by concept.

    Attributes:
        image_N: int64, the labelled images.
        concept_N: int64, the concept of each of them, 0 to K - 1.
        texts: Distinct captions.
        captions: For each concept the positions of its captions in ``texts``.
    """

    image_N: Tensor
    concept_N: Tensor
    texts: tuple[str, ...]
    captions: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, pairs: PairSet) -> Concepts:
        """Collect them. Raises UserError for fewer than two concepts."""
        labelled = pairs.by_role("labelled").tolist()
        names = sorted({pairs.rows[i].concept for i in labelled})
        if len(names) < 2:
            raise UserError(
                f"the labelled pairs hold {len(names)} concept; give at least two different captions"
            )
        place = {name: index for index, name in enumerate(names)}
        texts = pairs.training_texts()
        position = {text: index for index, text in enumerate(texts)}
        captions: list[list[int]] = [[] for _ in names]
        for i in labelled:
            row = pairs.rows[i]
            known = captions[place[row.concept]]
            known.extend(position[text] for text in row.captions if position[text] not in known)
        return cls(
            image_N=torch.tensor(labelled),
            concept_N=torch.tensor([place[pairs.rows[i].concept] for i in labelled]),
            texts=texts,
            captions=tuple(tuple(own) for own in captions),
        )

    def __len__(self) -> int:
        """Return K."""
        return len(self.captions)

    def names(self) -> Tensor:
        """Return the first caption of each concept, int64 [K], positions in ``texts``."""
        return torch.tensor([own[0] for own in self.captions])
