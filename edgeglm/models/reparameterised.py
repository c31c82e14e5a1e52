"""Convolutions that have more branches while they learn than when they run.

Beside each depthwise convolution stand a 1x1 one and, where shapes allow, the identity, each with a
normalisation of its own; their sum is one convolution, so that in the end they are merged into it and cost
nothing (RepVGG, Ding et al., 2021; over inverted residuals, MobileOne, Vasu et al., 2023). The added branches
start at nothing: an inherited network begins as what it is.

Shapes: B batch, C channels, H height, W width, K kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeglm.models.efficientnet_lite import BN_EPS, BN_MOMENTUM, LiteTrunk, MBConv, SameConv2d


class BranchedDepthwise(nn.Module):
    """A normalised depthwise convolution with two branches beside it; ``merged`` makes it one again."""

    def __init__(self, conv: SameConv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        channels = conv.out_channels
        stride = conv.stride[0]
        self.conv, self.norm = conv, norm
        self.point = SameConv2d(channels, channels, 1, stride=stride, groups=channels)
        self.point_norm = _silent(channels)
        self.skip_norm = _silent(channels) if stride == 1 else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W'], the sum of the branches."""
        total: Tensor = self.norm(self.conv(x_BCHW)) + self.point_norm(self.point(self._centres(x_BCHW)))
        return total if self.skip_norm is None else total + self.skip_norm(x_BCHW)

    def _centres(self, x_BCHW: Tensor) -> Tensor:
        """Return the pixels under the kernel's centre, which padding "SAME" shifts where the stride is 2."""
        stride, kernel = self.conv.stride[0], self.conv.kernel_size[0]
        if stride == 1:
            return x_BCHW
        offset = [kernel // 2 - _before(size, kernel, stride) for size in x_BCHW.shape[-2:]]
        return x_BCHW[..., offset[0] :, offset[1] :]

    @torch.no_grad()
    def merged(self) -> tuple[SameConv2d, nn.BatchNorm2d]:
        """Return one convolution and one normalisation that compute the same in eval mode."""
        kernel_C1KK, bias_C = _fused(self.conv.weight, self.norm)
        middle = kernel_C1KK.shape[-1] // 2
        branches: list[tuple[Tensor, nn.BatchNorm2d]] = [(self.point.weight, self.point_norm)]
        if self.skip_norm is not None:
            branches.append((torch.ones_like(self.point.weight), self.skip_norm))
        for weight_C111, norm in branches:
            point_C111, shift_C = _fused(weight_C111, norm)
            kernel_C1KK[:, :, middle, middle] += point_C111[:, :, 0, 0]
            bias_C = bias_C + shift_C
        self.conv.weight.copy_(kernel_C1KK)
        norm = self.norm
        norm.weight.fill_(1.0)
        norm.bias.copy_(bias_C)
        norm.running_mean.zero_()  # type: ignore[union-attr] # it tracks its statistics
        norm.running_var.fill_(1.0 - norm.eps)  # type: ignore[union-attr]
        return self.conv, norm


def branch(trunk: LiteTrunk, first: int = 0) -> None:
    """Give the depthwise convolutions of blocks ``first`` and later their branches, in place."""
    for block in trunk.blocks[first:]:
        assert isinstance(block, MBConv)
        block._depthwise_conv = BranchedDepthwise(block._depthwise_conv, block._bn1)  # type: ignore[assignment]
        block._bn1 = nn.Identity()  # type: ignore[assignment]


def merge(trunk: LiteTrunk) -> None:
    """Undo :func:`branch` in place: the plain network with the weights that compute the same in eval mode."""
    for block in trunk.blocks:
        assert isinstance(block, MBConv)
        if isinstance(branched := block._depthwise_conv, BranchedDepthwise):
            block._depthwise_conv, block._bn1 = branched.merged()


def _silent(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)
    nn.init.zeros_(norm.weight)
    return norm


def _before(size: int, kernel: int, stride: int) -> int:
    """Return how many pixels "SAME" adds in front of a row."""
    return max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2


def _fused(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of a convolution followed by a normalisation in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale_C = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * scale_C[:, None, None, None], norm.bias - norm.running_mean * scale_C
