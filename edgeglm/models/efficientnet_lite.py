"""EfficientNet-Lite0: MBConv blocks without squeeze-excitation, ReLU6, TensorFlow "SAME" padding.

Architecture: Tan & Le, "EfficientNet" (2019), and the EfficientNet-Lite release notes of TensorFlow TPU.
Parameter names follow the published PyTorch port, so that its state dict loads as it is.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_EPS = 1e-3
BN_MOMENTUM = 0.01


_CLASSIFIER = (
    "_conv_head.weight",
    *(f"_bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    "_fc.weight",
    "_fc.bias",
)


@dataclass(frozen=True)
class BlockShape:
    """One MBConv block: channels in and out, expansion ratio, kernel size and stride."""

    inputs: int
    outputs: int
    expand: int
    kernel: int
    stride: int


def _stage(
    repeats: int, inputs: int, outputs: int, expand: int, kernel: int, stride: int
) -> list[BlockShape]:
    first = BlockShape(inputs, outputs, expand, kernel, stride)
    return [first, *[BlockShape(outputs, outputs, expand, kernel, 1)] * (repeats - 1)]


LITE0_BLOCKS: tuple[BlockShape, ...] = (
    *_stage(1, 32, 16, 1, 3, 1),
    *_stage(2, 16, 24, 6, 3, 2),
    *_stage(2, 24, 40, 6, 5, 2),
    *_stage(3, 40, 80, 6, 3, 2),
    *_stage(3, 80, 112, 6, 5, 1),
    *_stage(4, 112, 192, 6, 5, 2),
    *_stage(1, 192, 320, 6, 3, 1),
)


class SameConv2d(nn.Conv2d):
    """A bias-free convolution padded as TensorFlow does: the odd pixel goes to the right and bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        symmetric = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, symmetric, groups=groups, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Convolve; [B, C, H, W] -> [B, C', ceil(H / stride), ceil(W / stride)]."""
        (stride, _), (kernel, _) = self.stride, self.kernel_size
        if stride > 1:
            rows, columns = x_BCHW.shape[-2:]
            down = max((-(-rows // stride) - 1) * stride + kernel - rows, 0)
            across = max((-(-columns // stride) - 1) * stride + kernel - columns, 0)
            x_BCHW = F.pad(x_BCHW, (across // 2, across - across // 2, down // 2, down - down // 2))
        convolved: Tensor = super().forward(x_BCHW)
        return convolved


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


class MBConv(nn.Module):
    """Expand (1x1), depthwise, project (1x1); a residual where shape allows."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        hidden = shape.inputs * shape.expand
        self.residual = shape.stride == 1 and shape.inputs == shape.outputs
        if shape.expand != 1:
            self._expand_conv = SameConv2d(shape.inputs, hidden, 1)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, shape.kernel, stride=shape.stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = SameConv2d(hidden, shape.outputs, 1)
        self._bn2 = _norm(shape.outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Apply the block."""
        y = x_BCHW
        if hasattr(self, "_expand_conv"):
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        projected: Tensor = self._bn2(self._project_conv(y))
        return x_BCHW + projected if self.residual else projected


class LiteStem(nn.Module):
    """Pixels in [0, 1] to the 32 channels that the first block takes, at half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = _norm(32)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Scale to the network's own range, (255 x - 127) / 128, then convolve."""
        return F.relu6(self._bn0(self._conv_stem(pixels_BCHW * (255 / 128) - 127 / 128)))


class LiteTrunk(nn.Module):
    """The stem and the first blocks of EfficientNet-Lite0, without its classifier.

    Attributes:
        taps: Blocks, counted from 0, whose activations are returned.
    """

    def __init__(self, blocks: int, taps: Sequence[int]) -> None:
        super().__init__()
        if not 1 <= blocks <= len(LITE0_BLOCKS) or not all(0 <= tap < blocks for tap in taps):
            raise ValueError(f"no taps {list(taps)} in {blocks} of the {len(LITE0_BLOCKS)} blocks of Lite0")
        self.taps = tuple(taps)
        self.stem = LiteStem()
        self.blocks = nn.ModuleList(MBConv(shape) for shape in LITE0_BLOCKS[:blocks])

    def forward(self, pixels_BCRR: Tensor) -> tuple[Tensor, ...]:
        """Return the activation after each tapped block: [B, C, R / stride, R / stride]."""
        return self.rest(self.stem(pixels_BCRR))

    def front(self, pixels_BCRR: Tensor, blocks: int) -> Tensor:
        """Return the activation after the stem and the first ``blocks`` blocks, which may be cached."""
        x: Tensor = self.stem(pixels_BCRR)
        for block in self.blocks[:blocks]:
            x = block(x)
        return x

    def rest(self, x_BCHW: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """Go on from the activation before block ``start``; returns what :meth:`forward` does."""
        x, tapped = x_BCHW, []
        for index, block in enumerate(self.blocks[start:], start):
            x = block(x)
            if index in self.taps:
                tapped.append(x)
        return tuple(tapped)

    def part(self, blocks: int) -> list[nn.Module]:
        """Return the modules that :meth:`front` runs."""
        return [self.stem, *self.blocks[:blocks]]


class SpatialLite0(nn.Module):
    """Features that keep where something is: tapped activations on a ``grid`` x ``grid`` map, flattened.

    The last tap comes first. F is the sum of the taps' channels times grid squared.
    """

    def __init__(self, trunk: LiteTrunk, grid: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.grid = grid

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, R, R] in [0, 1] -> [B, F]."""
        tapped = reversed(self.trunk(pixels))
        return torch.cat([F.adaptive_avg_pool2d(x, self.grid).flatten(1) for x in tapped], dim=1)


class Lite0Classifier(nn.Module):
    """The whole published network: logits of the 1,000 classes of ImageNet, in the order of their synsets."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        last = LITE0_BLOCKS[-1].outputs
        self.trunk = lite0_trunk(state)
        missing = sorted({*_CLASSIFIER} - state.keys())
        if missing:
            raise ValueError(f"these weights are not of EfficientNet-Lite0: {missing[0]} is missing")
        width, classes = state["_conv_head.weight"].shape[0], state["_fc.weight"].shape[0]
        self._conv_head, self._bn1 = SameConv2d(last, width, 1), _norm(width)
        self._fc = nn.Linear(width, classes)
        self.load_state_dict({name: state[name].contiguous() for name in _CLASSIFIER}, strict=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, R, R] in [0, 1] -> [B, 1000]."""
        (x,) = self.trunk(pixels)
        logits: Tensor = self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))
        return logits


def lite0_trunk(state: Mapping[str, Tensor], *, blocks: int = 16, taps: Sequence[int] = (15,)) -> LiteTrunk:
    """Build the first ``blocks`` blocks of EfficientNet-Lite0 with the published weights.

    Args:
        state: The published state dict; its head and classifier are left out.
        blocks: How many of the 16 blocks.
        taps: Blocks whose activations are returned.

    Raises:
        ValueError: The state dict is of another network.
    """
    trunk = LiteTrunk(blocks, taps)
    wanted = trunk.state_dict()
    given = {
        name.replace("_conv_stem", "stem._conv_stem").replace("_blocks.", "blocks."): value
        for name, value in state.items()
    }
    given |= {f"stem.{name}": value for name, value in state.items() if name.startswith("_bn0.")}
    found = {name: given[name].contiguous() for name in wanted if name in given}
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"these weights are not of EfficientNet-Lite0: {missing[0]} is missing")
    trunk.load_state_dict(found)
    return trunk
