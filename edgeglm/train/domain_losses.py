"""What tells two domains apart, as losses: means in a kernel space, covariances, and a discriminator.

Shapes: S source samples, T target samples, D dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Widths of the kernels as multiples of the mean squared distance: powers of two around it, as in DAN.
MMD_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
_RAMP_STEEPNESS = 10.0


def kernel_mean_distance(source_SD: Tensor, target_TD: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy under a mean of five Gaussian kernels: a scalar >= 0.

    Gretton et al. (2012), with several widths as in DAN (Long et al., 2015). The mean squared distance of
    all pairs, which sets the widths, is taken for a constant.
    """
    both = torch.cat([source_SD, target_TD])
    squared = torch.cdist(both, both).square()
    count = len(both)
    scale = squared.detach().sum() / max(1, count * (count - 1))
    kernels = [torch.exp(-squared / (width * scale).clamp(min=1e-8)) for width in MMD_WIDTHS]
    kernel = torch.stack(kernels).mean(0)
    split = len(source_SD)
    within = kernel[:split, :split].mean() + kernel[split:, split:].mean()
    return (within - 2.0 * kernel[:split, split:].mean()).clamp(min=0.0)


def covariance_distance(source_SD: Tensor, target_TD: Tensor) -> Tensor:
    """Return the squared Frobenius distance of the two covariances over 4 D^2 (Deep CORAL, 2016).

    Embeddings of length one are scaled by the root of D first, so that a coordinate varies by about one
    and the figure does not vanish with D.
    """
    width = source_SD.shape[1]
    between = (_covariance(source_SD) - _covariance(target_TD)) * width
    return between.square().sum() / (4 * width * width)


def _covariance(x_ND: Tensor) -> Tensor:
    centred = x_ND - x_ND.mean(0)
    return centred.T @ centred / max(1, len(x_ND) - 1)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reversed_gradient(x: Tensor, strength: float) -> Tensor:
    """Return ``x`` itself, whose gradient is multiplied by ``-strength`` on the way back."""
    found: Tensor = _Reversed.apply(x, strength)  # type: ignore[no-untyped-call]
    return found


def reversal_ramp(progress: float) -> float:
    """Return the strength of the reversal at a share of training: 2 / (1 + exp(-10 p)) - 1.

    Ganin & Lempitsky (2015): 0 at first, while the discriminator still knows nothing, then nearly 1.
    """
    return 2.0 / (1.0 + math.exp(-_RAMP_STEEPNESS * progress)) - 1.0


class DomainDiscriminator(nn.Module):
    """A small perceptron that tells source from target embeddings, [B, D] -> logits [B]."""

    def __init__(self, embedding_dim: int, *, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embedding_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return logits; positive means target."""
        logits: Tensor = self.layers(x_BD)[:, 0]
        return logits


def adversarial_loss(
    discriminator: DomainDiscriminator, source_SD: Tensor, target_TD: Tensor, *, strength: float
) -> Tensor:
    """Return the discriminator's cross-entropy; what made the embeddings gets its gradient reversed (DANN).

    Both domains weigh the same, whatever their counts.
    """
    source_S = discriminator(reversed_gradient(source_SD, strength))
    target_T = discriminator(reversed_gradient(target_TD, strength))
    as_source = F.binary_cross_entropy_with_logits(source_S, torch.zeros_like(source_S))
    as_target = F.binary_cross_entropy_with_logits(target_T, torch.ones_like(target_T))
    return 0.5 * (as_source + as_target)
