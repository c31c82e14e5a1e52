"""Augmented views that can be made again from a seed, at any resolution.

The parameters of every view are drawn for all images at once and independent of resolution, so what
a teacher saw at 128 pixels a student can be shown at 64: the cached target stays the right one
(dataset reinforcement, Faghri et al., 2023).

Shapes: N images, B batch, R resolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeglm.data.pairs import PairSet
from edgeglm.data.transforms import model_input_from_pixels

_ROTATION = 0.26  # radians
_LOG_ASPECT = 0.15
_SCALE = (0.85, 1.3)  # of the sampled window: above 1 the picture becomes smaller
_SHIFT = 0.1  # of half the side
_SATURATION = (0.2, 1.5)
_CONTRAST = (0.7, 1.25)
_CHANNEL_MIX = 0.1


@dataclass(frozen=True)
class ViewParameters:
    """How each of N images is distorted: an affine map [N, 2, 3], a colour map [N, 3, 3], contrast [N]."""

    affine: Tensor
    colour: Tensor
    contrast: Tensor

    def of(self, chosen: Tensor) -> ViewParameters:
        """Return the parameters of the chosen images, int64 [B]."""
        return ViewParameters(self.affine[chosen], self.colour[chosen], self.contrast[chosen])


def view_parameters(count: int, *, seed: int, view: int) -> ViewParameters:
    """Draw the parameters of one view of ``count`` images. ``view`` counts from 1; view 0 is the original."""
    rng = np.random.default_rng((seed, view))
    angle = rng.uniform(-_ROTATION, _ROTATION, count)
    scale = rng.uniform(*_SCALE, count)
    aspect = np.exp(rng.uniform(-_LOG_ASPECT, _LOG_ASPECT, count))
    affine = np.zeros((count, 2, 3))
    affine[:, 0, 0], affine[:, 0, 1] = np.cos(angle) * scale * aspect, -np.sin(angle) * scale * aspect
    affine[:, 1, 0], affine[:, 1, 1] = np.sin(angle) * scale / aspect, np.cos(angle) * scale / aspect
    affine[:, :, 2] = rng.uniform(-_SHIFT, _SHIFT, (count, 2))
    mix = np.eye(3) + rng.normal(0.0, _CHANNEL_MIX, (count, 3, 3))
    mix /= mix.sum(axis=2, keepdims=True)  # grey stays grey
    saturation = rng.uniform(*_SATURATION, count)[:, None, None]
    to_grey = saturation * np.eye(3) + (1 - saturation) / 3
    contrast = rng.uniform(*_CONTRAST, count)
    return ViewParameters(
        torch.from_numpy(affine).float(),
        torch.from_numpy(mix @ to_grey).float(),
        torch.from_numpy(contrast).float(),
    )


def distorted(pixels_B3RR: Tensor, parameters: ViewParameters) -> Tensor:
    """Apply a view to float32 [B, 3, R, R] in [0, 1]; what comes from outside the picture is white."""
    grid = F.affine_grid(parameters.affine, list(pixels_B3RR.shape), align_corners=False)
    moved = F.grid_sample(pixels_B3RR - 1.0, grid, align_corners=False) + 1.0
    mixed = torch.einsum("nij,njhw->nihw", parameters.colour, moved)
    ink = (1.0 - mixed) * parameters.contrast[:, None, None, None]
    return (1.0 - ink).clamp(0.0, 1.0)


class Views:
    """Every view of the images of a set at one resolution.

    View 0 is what a device shows its model: with the margin of the pairs, and else as it is. The others are
    distorted from the whole picture, which they show smaller or larger.
    """

    def __init__(self, pairs: PairSet, count: int, *, seed: int, resolution: int) -> None:
        """Draw ``count`` views, the first included."""
        self._pairs, self._resolution = pairs, resolution
        self._drawn = [view_parameters(len(pairs), seed=seed, view=view) for view in range(count)]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._drawn)

    def every(self, chosen_B: Tensor) -> Iterator[Tensor]:
        """Yield each view of the chosen images, int64 [B], in order: float32 [B, 3, R, R] in [0, 1]."""
        yield self._plain(chosen_B)
        if len(self) > 1:
            whole = self._whole(chosen_B)
            for drawn in self._drawn[1:]:
                yield distorted(whole, drawn.of(chosen_B))

    def one(self, view: int, chosen_B: Tensor) -> Tensor:
        """Return one view of the chosen images, int64 [B]: float32 [B, 3, R, R] in [0, 1]."""
        if view == 0:
            return self._plain(chosen_B)
        return distorted(self._whole(chosen_B), self._drawn[view].of(chosen_B))

    def _plain(self, chosen_B: Tensor) -> Tensor:
        return torch.from_numpy(self._pairs.shown(chosen_B.numpy(), self._resolution))

    def _whole(self, chosen_B: Tensor) -> Tensor:
        pixels = np.asarray(self._pairs.images[chosen_B.numpy()])
        return torch.from_numpy(model_input_from_pixels(pixels, self._resolution))
