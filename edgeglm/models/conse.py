"""Heads whose embeddings hold what nothing here was taught: what a classifier calls a picture.

ConSE (Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings", 2014): a picture is
where the names of a classifier's classes are, weighed by their probabilities. Added to what a head learned,
on both sides along the same axes, it places pictures of things that no pair names.

Shapes: B batch, N labelled images, T training texts, F features that the learned head reads, K classes, C
those that are named, E features of a text, L tokens, D embedding dimensions.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.models.projection import LearnedHead, ProjectionHead, normalized


class BothTowers(nn.Module):
    """The features of a text tower that was tuned, then those of the tower as it was before, [B, 2 E]."""

    def __init__(self, tuned: nn.Module, before: nn.Module) -> None:
        super().__init__()
        self.tuned, self.before = tuned, before

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return float32 [B, 2 E] of int64 [B, L] tokens and their mask."""
        towers = (self.tuned, self.before)
        return torch.cat([tower(input_ids, attention_mask) for tower in towers], dim=1)


class ConseTextHead(nn.Module):
    """What a head says of a text's features, plus ``weight`` times others along their first D axes.

    It reads [B, E], or [B, 2 E] of :class:`BothTowers`: tuning draws the features of a text to the pictures
    that it learns from, and away from what the same words say of a class.
    """

    def __init__(self, learned: ProjectionHead, *, weight: float) -> None:
        super().__init__()
        features, dimensions = learned.direct.in_features, learned.direct.out_features
        self.learned, self.weight = learned, weight
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("axes", torch.zeros(features, dimensions))
        self.mean: Tensor
        self.axes: Tensor

    @torch.no_grad()
    def standardise(self, sample_TE: Tensor) -> None:
        """Take mean and principal axes of texts, [T, E] or [T, 2 E]; where D exceeds E the rest stay zero."""
        self.learned.standardise(sample_TE[:, : len(self.mean)])
        rows_TE = self._untuned(sample_TE)
        self.mean.copy_(rows_TE.mean(0))
        _, axes_EE = torch.linalg.eigh((rows_TE - self.mean).T @ (rows_TE - self.mean))
        kept = min(self.axes.shape)
        self.axes.zero_()
        self.axes[:, :kept] = axes_EE.flip(1)[:, :kept]

    @torch.no_grad()
    def names(self, features_CE: Tensor) -> Tensor:
        """Return where names of classes are, [C, E] or [C, 2 E] -> float32 [C, D], their mean taken off."""
        rows_CE = self._untuned(features_CE)
        found: Tensor = (rows_CE - rows_CE.mean(0)) @ self.axes
        return found

    def forward(self, x_BE: Tensor) -> Tensor:
        """[B, E] or [B, 2 E] -> float [B, D], rows of length one."""
        said_BD = normalized((self._untuned(x_BE) - self.mean) @ self.axes)
        learned_BD: Tensor = self.learned(x_BE[:, : len(self.mean)])
        return normalized(learned_BD + self.weight * said_BD)

    def _untuned(self, x_BE: Tensor) -> Tensor:
        """Return what the tower says that was not tuned, [B, E], rows of length one."""
        return normalized(x_BE[:, -len(self.mean) :].float())


class ConseImageHead(nn.Module):
    """What a head says of features, plus ``weight`` times the names of the classes that logits tell.

    It reads [B, F + K], the logits last. ``centre`` and ``names`` are buffers: they are data, found
    by :meth:`standardise` and :meth:`call`, and exported.
    """

    def __init__(
        self,
        learned: LearnedHead,
        named_C: Tensor,
        *,
        classes: int,
        dimensions: int,
        weight: float,
        temperature: float,
    ) -> None:
        super().__init__()
        self.learned, self.classes = learned, classes
        self.weight, self.temperature = weight, temperature
        self.register_buffer("named", named_C)
        self.register_buffer("centre", torch.zeros(len(named_C)))
        self.register_buffer("names", torch.zeros(len(named_C), dimensions))
        self.named: Tensor
        self.centre: Tensor
        self.names: Tensor

    @torch.no_grad()
    def standardise(self, sample_NF: Tensor) -> None:
        """Take the learned head's own statistics, and the mean logits, of labelled images [N, F + K]."""
        self.learned.standardise(sample_NF[:, : -self.classes])
        self.centre.copy_(sample_NF[:, -self.classes :].float().mean(0)[self.named])

    @torch.no_grad()
    def call(self, names_CD: Tensor) -> None:
        """Say where the names of the classes are, as :meth:`ConseTextHead.names` returns it."""
        self.names.copy_(names_CD)

    def forward(self, x_BF: Tensor) -> Tensor:
        """[B, F + K] -> float [B, D], rows of length one."""
        logits_BC = x_BF[:, -self.classes :].index_select(1, self.named) - self.centre
        told_BD = normalized(F.softmax(logits_BC / self.temperature, dim=1) @ self.names)
        learned_BD: Tensor = self.learned(x_BF[:, : -self.classes])
        return normalized(learned_BD + self.weight * told_BD)

    def last_layers(self) -> list[Tensor]:
        """Return the weights that make the embedding."""
        return self.learned.last_layers()


ImageHead: TypeAlias = LearnedHead | ConseImageHead
TextHead: TypeAlias = ProjectionHead | ConseTextHead


def learned_head(head: ImageHead) -> LearnedHead:
    """Return the part of an image head that was learned."""
    return head.learned if isinstance(head, ConseImageHead) else head
