"""The head that takes frozen features into the shared embedding space.

Shapes: B batch, F features, H hidden, D embedding dimensions, E members of an ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: 1e-12, torch's own, is zero in FP16 and makes an FP16 engine divide by zero.
NORM_EPS = 1e-6
_STD_FLOOR = 1e-3
_CLIP = 8.0
_SCALE_PACE = 10.0


def normalized(x_BD: Tensor) -> Tensor:
    """L2-normalise rows, [B, D] -> [B, D]."""
    return F.normalize(x_BD, dim=-1, eps=NORM_EPS)


class ProjectionHead(nn.Module):
    """Standardised features -> a linear map plus a two-layer perceptron -> L2-normalised embedding.

    The linear path lets a head start as good as a linear probe; the perceptron adds what that lacks.
    ``mean`` and ``std`` are buffers: they are data, found once by :meth:`standardise`, and exported.
    """

    def __init__(
        self, features: int, embedding_dim: int, *, hidden: int, input_dropout: float, dropout: float
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.mean: Tensor
        self.std: Tensor
        self.norm = nn.LayerNorm(features)
        self.input_dropout = nn.Dropout(input_dropout)
        self.direct = nn.Linear(features, embedding_dim)
        self.rise = nn.Linear(features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fall = nn.Linear(hidden, embedding_dim)

    @torch.no_grad()
    def standardise(self, sample_NF: Tensor) -> None:
        """Take mean and deviation from training features [N, F]."""
        self.mean.copy_(sample_NF.float().mean(0))
        self.std.copy_(sample_NF.float().std(0) + _STD_FLOOR)

    def forward(self, x_BF: Tensor) -> Tensor:
        """[B, F] -> float [B, D], rows of length one."""
        x_BF = ((x_BF - self.mean) / self.std).clamp(-_CLIP, _CLIP)
        x_BF = self.input_dropout(self.norm(x_BF))
        return normalized(self.direct(x_BF) + self.fall(self.dropout(F.gelu(self.rise(x_BF)))))

    def last_layers(self) -> list[Tensor]:
        """Return the weights that make the embedding."""
        return [self.direct.weight, self.fall.weight]


class ScaledHeads(nn.Module):
    """One head for each member of an ensemble; the embedding is their sum at a learned scale, of length one.

    The scales are positive, add up to 1, and start equal; they learn with the heads, from the same pairs. By
    the logits as they are, Adam would need thousands of steps to move them.
    """

    def __init__(self, heads: Sequence[ProjectionHead], widths: Sequence[int]) -> None:
        super().__init__()
        assert len(heads) == len(widths) > 1
        self.heads = nn.ModuleList(heads)
        self.widths = list(widths)
        self.logits = nn.Parameter(torch.zeros(len(heads)))

    @property
    def scales(self) -> Tensor:
        """The scale of each member, float32 [E]."""
        return torch.softmax(_SCALE_PACE * self.logits, 0)

    @torch.no_grad()
    def standardise(self, sample_NF: Tensor) -> None:
        """Take mean and deviation of each member's training features, [N, F] in all."""
        for head, part_NF in zip(self.heads, torch.split(sample_NF, self.widths, dim=1), strict=True):
            assert isinstance(head, ProjectionHead)
            head.standardise(part_NF)

    def forward(self, x_BF: Tensor) -> Tensor:
        """[B, F] -> float [B, D], rows of length one."""
        parts = torch.split(x_BF, self.widths, dim=1)
        embedded_EBD = torch.stack([head(part) for head, part in zip(self.heads, parts, strict=True)])
        return normalized((self.scales[:, None, None] * embedded_EBD).sum(0))

    def last_layers(self) -> list[Tensor]:
        """Return the weights that make the embedding."""
        heads = [head for head in self.heads if isinstance(head, ProjectionHead)]
        return [weight for head in heads for weight in head.last_layers()]


LearnedHead: TypeAlias = ProjectionHead | ScaledHeads
