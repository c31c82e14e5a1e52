"""The last blocks of EfficientNet-Lite0, tuned on pictures under the heads of an alignment.

What the blocks before them say to a view never changes: ONNX Runtime computes it once, and the blocks that
learn go on from it. Their batch norms keep the published statistics, so that the tower folds as it did.

Shapes: V views, N images, U images whose maps are kept, C channels, H height, W width, F features, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.core.durable import take_place
from edgeglm.core.progress import Progress
from edgeglm.data.pairs import PairSet
from edgeglm.models.efficientnet_lite import LiteTrunk, SpatialLite0
from edgeglm.train.views import Views

_BLOCK = 64  # images at once


class _Front(nn.Module):
    def __init__(self, trunk: LiteTrunk, blocks: int) -> None:
        super().__init__()
        self.trunk, self.blocks = trunk, blocks

    def forward(self, pixels: Tensor) -> Tensor:
        return self.trunk.front(pixels, self.blocks)


class TunedBlocks:
    """The blocks of a backbone that learn, and the features of any view of an image with them as they are.

    Attributes:
        tower: The whole backbone; what is trained is its own.
        first: The first block that is trained, counted from 0.
    """

    def __init__(
        self, tower: SpatialLite0, blocks: int, features_VNF: Tensor, maps_VU: Tensor, chosen: Sequence[int],
        *, column: int = 0,
    ) -> None:  # fmt: skip
        """Unfreeze the last blocks.

        Args:
            tower: As published.
            blocks: How many of its last blocks learn.
            features_VNF: Of all frozen backbones, side by side.
            maps_VU: From :func:`front_maps`.
            chosen: The images U that the maps are of.
            column: Where this backbone's features begin.
        """
        self.tower, self.first = tower, len(tower.trunk.blocks) - blocks
        self._features_VNF, self._maps_VU, self._column = features_VNF, maps_VU, column
        self._place_N = torch.full((features_VNF.shape[1],), -1)
        self._place_N[torch.as_tensor(chosen, dtype=torch.int64)] = torch.arange(len(chosen))
        tower.requires_grad_(False)
        tower.eval()
        for block in tower.trunk.blocks[self.first :]:
            block.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return [parameter for parameter in self.tower.parameters() if parameter.requires_grad]

    def read(self, view_B: Tensor, image_B: Tensor) -> Tensor:
        """Return features [B, F] of views of images, with gradients to the blocks that learn."""
        maps_BCHW = self._maps_VU[view_B, self._place_N[image_B]].float()
        maps_BCHW = maps_BCHW.contiguous(memory_format=torch.channels_last)
        tapped = reversed(self.tower.trunk.rest(maps_BCHW, self.first))  # the last tap comes first
        ours = [F.adaptive_avg_pool2d(x, self.tower.grid).flatten(1) for x in tapped]
        rows_BF = self._features_VNF[view_B, image_B].float()
        behind = self._column + sum(part.shape[1] for part in ours)
        return torch.cat([rows_BF[:, : self._column], *ours, rows_BF[:, behind:]], dim=1)


def front_maps(
    tower: SpatialLite0,
    blocks: int,
    pairs: PairSet,
    chosen: Sequence[int],
    folder: Path,
    *,
    views: int,
    seed: int,
    resolution: int,
    threads: int,
    progress: Progress,
) -> Tensor:
    """Return what the last ``blocks`` blocks take of every view: float16 [V, U, C, H, W], in a file.

    Args:
        tower: The backbone.
        blocks: How many of its last blocks are to learn.
        pairs: The images.
        chosen: Which of them.
        folder: For the file, and for the graph of the first blocks.
        views: V, the plain one counted.
        seed: Of the views: that of the cached features.
        resolution: Side of the input in pixels.
        threads: Of ONNX Runtime.
        progress: Shows the images.
    """
    from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
    from edgeglm.export.parity import assert_parity
    from edgeglm.export.torch_to_onnx import onnx_from_module

    front = _Front(tower.trunk, len(tower.trunk.blocks) - blocks).eval()
    example = torch.rand(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shape = front(example).shape[1:]
    graph = folder / "front.onnx"
    onnx_from_module(
        front, {"pixels": example}, graph, output_names=("map",), dynamic_axes={"pixels": {0: "batch"}}
    )
    assert_parity(front, graph, [{"pixels": example}, {"pixels": example[:1]}], atol=1e-3)
    maps = np.lib.format.open_memmap(
        folder / "maps.npy", mode="w+", dtype=np.float16, shape=(views, len(chosen), *shape)
    )
    take_place(folder / "maps.npy")
    drawn = Views(pairs, views, seed=seed, resolution=resolution)
    with (
        OnnxRuntimeEngine(graph, threads=threads) as engine,
        progress.task("Teacher: maps of pictures", total=views * len(chosen)) as task,
    ):
        for start in range(0, len(chosen), _BLOCK):
            images = torch.tensor(chosen[start : start + _BLOCK])
            for view, pixels in enumerate(drawn.every(images)):
                maps[view, start : start + len(images)] = engine.infer({"pixels": pixels.numpy()})["map"]
                task.advance(len(images))
    maps.flush()
    return torch.from_numpy(np.load(folder / "maps.npy", mmap_mode="c"))
