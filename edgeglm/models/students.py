"""The light towers.

The image tower is the beginning of EfficientNet-Lite0, so that it inherits the published weights,
with a head that keeps *where* something is: the last activation is flattened, not averaged. On
drawings, whose layout carries the meaning, averaging costs a fifth of the mAP.

The text tower has factorised embeddings (Lan et al., ALBERT, 2019): most of a small text model is
its vocabulary.

Shapes: B batch, R resolution, L tokens, W width, A heads, D embedding dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.models.efficientnet_lite import LITE0_BLOCKS, LiteTrunk
from edgeglm.models.projection import normalized
from edgeglm.models.student_shapes import StudentShape

#: Enough to make a masked score vanish in softmax, and far from FP16's limit of 65,504.
MASKED = -1e4


class StudentImageTower(nn.Module):
    """Pixels float32 [B, 3, R, R] in [0, 1] -> L2-normalised embedding [B, D]."""

    def __init__(self, shape: StudentShape, *, resolution: int, embedding_dim: int) -> None:
        super().__init__()
        self.trunk = LiteTrunk(shape.blocks, (shape.blocks - 1,))
        self.squeeze = nn.Conv2d(LITE0_BLOCKS[shape.blocks - 1].outputs, shape.channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(shape.channels)
        side = _map_side(shape.blocks, resolution)
        self.project = nn.Linear(shape.channels * side * side, embedding_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed a batch of images."""
        return self.head(self.trunk(pixels)[0])

    def head(self, x_BCHW: Tensor) -> Tensor:
        """Turn the trunk's activation into the embedding."""
        x_BCHW = F.relu6(self.norm(self.squeeze(x_BCHW)))
        return normalized(self.project(x_BCHW.flatten(1)))


class StudentTextTower(nn.Module):
    """Token ids and mask, int64 [B, L] -> L2-normalised embedding [B, D]. L is at most ``max_length``."""

    def __init__(self, shape: StudentShape, *, vocabulary: int, max_length: int, embedding_dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, shape.factor)
        self.widen = nn.Linear(shape.factor, shape.width)
        self.places = nn.Parameter(torch.zeros(max_length, shape.width))
        self.norm = nn.LayerNorm(shape.width)
        self.layers = nn.ModuleList(TextLayer(shape.width, shape.heads) for _ in range(shape.layers))
        self.last_norm = nn.LayerNorm(shape.width)
        self.project = nn.Linear(shape.width, embedding_dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed a batch of texts; masked tokens change nothing."""
        mask_BL1 = attention_mask[:, :, None].to(self.places.dtype)
        bias_B11L = (1.0 - mask_BL1).transpose(1, 2)[:, None] * MASKED
        x_BLW = self.norm(self.widen(self.tokens(input_ids)) + self.places[: input_ids.shape[1]])
        for layer in self.layers:
            x_BLW = layer(x_BLW, bias_B11L)
        x_BLW = self.last_norm(x_BLW)
        mean_BW = (x_BLW * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1.0)
        return normalized(self.project(mean_BW))


class TextLayer(nn.Module):
    """A pre-norm Transformer layer (Xiong et al., 2020), expansion 4, GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, 4 * width)
        self.fall = nn.Linear(4 * width, width)

    def forward(self, x_BLW: Tensor, bias_B11L: Tensor) -> Tensor:
        """[B, L, W] and an additive mask [B, 1, 1, L] -> [B, L, W]."""
        y = self.norm(x_BLW)
        query, key, value = (self._split(part(y)) for part in (self.query, self.key, self.value))
        score_BALL = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5) + bias_B11L
        mixed_BLW = (score_BALL.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x_BLW = x_BLW + self.out(mixed_BLW)
        fallen: Tensor = self.fall(F.gelu(self.rise(self.mlp_norm(x_BLW))))
        return x_BLW + fallen

    def _split(self, x_BLW: Tensor) -> Tensor:
        batch, length, width = x_BLW.shape
        return x_BLW.view(batch, length, self.heads, width // self.heads).transpose(1, 2)


def _map_side(blocks: int, resolution: int) -> int:
    """Return the side of the activation after ``blocks`` blocks: SAME padding rounds up."""
    side = -(-resolution // 2)
    for shape in LITE0_BLOCKS[:blocks]:
        side = -(-side // shape.stride)
    return side
