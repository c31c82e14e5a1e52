"""Heads of one kind, trained from seeds of their own, whose embeddings are joined into one.

Deep ensembles (Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep
Ensembles", 2017), joined for retrieval: side by side the embeddings of all members have the mean of their
similarities for their own, and along few axes of the space that they span they keep nearly all of it.

Shapes: B batch, F features, M members, R rows, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeglm.models.projection import normalized


class JoinedHeads(nn.Module):
    """What all members say, side by side, along ``axes``: float32 [M D, D], orthonormal columns.

    The image heads and the text heads of a teacher are joined along the same axes.
    """

    def __init__(self, members: Sequence[nn.Module], axes: Tensor) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("axes", axes)
        self.axes: Tensor

    def forward(self, x_BF: Tensor) -> Tensor:
        """[B, F] -> float [B, D], rows of length one."""
        said_BMD = torch.cat([member(x_BF) for member in self.members], dim=1)
        return normalized(said_BMD @ self.axes)


def common_axes(sides: Sequence[Tensor], dimensions: int) -> Tensor:
    """Return the axes along which most of the products of embeddings is kept, float32 [M D, dimensions].

    They are those of the largest second moments, not centred, so that products and not distances from a mean
    are kept; each side counts as much as another.

    Args:
        sides: For each side, what all its members say side by side of what trains: [R, M D].
        dimensions: How many axes.
    """
    moments = torch.stack([side_RE.T.double() @ side_RE.double() / len(side_RE) for side_RE in sides])
    axes: Tensor = torch.linalg.eigh(moments.sum(0)).eigenvectors
    return axes.flip(1)[:, :dimensions].float().contiguous()
