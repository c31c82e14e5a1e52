"""The light towers.

The image tower is the beginning of EfficientNet-Lite0, so that it inherits the published weights,
with a head that keeps *where* something is: the last activation is flattened, not averaged. On
drawings, whose layout carries the meaning, averaging costs a fifth of the mAP.

The text tower has factorised embeddings (Lan et al., ALBERT, 2019): most of a small text model is
its vocabulary. Its layers normalise before each sum, or after it where they are a BERT's, whose weights
they then can take.

Shapes: B batch, R resolution, L tokens, W width, A heads, D embedding dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.core.errors import UserError
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


class VitStudentImageTower(nn.Module):
    """Pixels float32 [B, 3, R, R] in [0, 1] -> L2-normalised embedding [B, D], by a small ViT.

    Patches are cut by one convolution; all tokens are squeezed and flattened as in the convolutional tower,
    so that the place of a thing is kept (no class token; Dosovitskiy et al., 2021, for the rest).
    """

    def __init__(self, shape: StudentShape, *, resolution: int, embedding_dim: int) -> None:
        super().__init__()
        side = resolution // shape.patch
        if not side:
            raise UserError(
                f"images of {resolution} pixels hold no patch of {shape.patch}; raise student.resolution"
            )
        self.cut = nn.Conv2d(3, shape.patch_width, shape.patch, shape.patch)
        self.places = nn.Parameter(torch.zeros(side * side, shape.patch_width))
        nn.init.trunc_normal_(self.places, std=0.02)
        heads = max(1, shape.patch_width // 32)
        self.layers = nn.ModuleList(TextLayer(shape.patch_width, heads) for _ in range(shape.blocks))
        self.last_norm = nn.LayerNorm(shape.patch_width)
        self.squeeze = nn.Linear(shape.patch_width, shape.channels)
        self.project = nn.Linear(shape.channels * side * side, embedding_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed a batch of images; pixels that fill no patch, at the right and bottom, are left out."""
        x_BNW = self.cut(pixels * 2.0 - 1.0).flatten(2).transpose(1, 2) + self.places
        seen_B11N = x_BNW.new_zeros(1, 1, 1, x_BNW.shape[1])
        for layer in self.layers:
            x_BNW = layer(x_BNW, seen_B11N)
        squeezed_BNC = F.gelu(self.squeeze(self.last_norm(x_BNW)))
        return normalized(self.project(squeezed_BNC.flatten(1)))


ImageTower = StudentImageTower | VitStudentImageTower


def student_image_tower(shape: StudentShape, *, resolution: int, embedding_dim: int) -> ImageTower:
    """Make the image tower of a shape, with random weights. Raises UserError for too small a resolution."""
    if shape.patch:
        return VitStudentImageTower(shape, resolution=resolution, embedding_dim=embedding_dim)
    return StudentImageTower(shape, resolution=resolution, embedding_dim=embedding_dim)


class StudentTextTower(nn.Module):
    """Token ids and mask, int64 [B, L] -> L2-normalised embedding [B, D]. L is at most ``max_length``."""

    def __init__(self, shape: StudentShape, *, vocabulary: int, max_length: int, embedding_dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, shape.factor)
        self.widen = nn.Linear(shape.factor, shape.width)
        self.places = nn.Parameter(torch.zeros(max_length, shape.width))
        self.norm = nn.LayerNorm(shape.width)
        self.layers = nn.ModuleList(
            TextLayer(shape.width, shape.heads, norm_last=shape.heir, feedforward=shape.inner)
            for _ in range(shape.layers)
        )
        self.last_norm = nn.Identity() if shape.heir else nn.LayerNorm(shape.width)
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
    """A Transformer layer with GELU.

    It normalises before each sum (Xiong et al., 2020), or with ``norm_last`` after it, as BERT does. Its
    feed-forward part is ``feedforward`` wide inside, four times ``width`` at 0.
    """

    def __init__(self, width: int, heads: int, *, norm_last: bool = False, feedforward: int = 0) -> None:
        super().__init__()
        self.heads, self.norm_last = heads, norm_last
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, feedforward or 4 * width)
        self.fall = nn.Linear(feedforward or 4 * width, width)

    def forward(self, x_BLW: Tensor, bias_B11L: Tensor) -> Tensor:
        """[B, L, W] and an additive mask [B, 1, 1, L] -> [B, L, W]."""
        if self.norm_last:
            x_BLW = self.norm(x_BLW + self._mixed(x_BLW, bias_B11L))
            last: Tensor = self.mlp_norm(x_BLW + self.fall(F.gelu(self.rise(x_BLW))))
            return last
        x_BLW = x_BLW + self._mixed(self.norm(x_BLW), bias_B11L)
        fallen: Tensor = self.fall(F.gelu(self.rise(self.mlp_norm(x_BLW))))
        return x_BLW + fallen

    def _mixed(self, y: Tensor, bias_B11L: Tensor) -> Tensor:
        query, key, value = (self._split(part(y)) for part in (self.query, self.key, self.value))
        score_BALL = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5) + bias_B11L
        mixed: Tensor = self.out((score_BALL.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x_BLW: Tensor) -> Tensor:
        batch, length, width = x_BLW.shape
        return x_BLW.view(batch, length, self.heads, width // self.heads).transpose(1, 2)


def _map_side(blocks: int, resolution: int) -> int:
    """Return the side of the activation after ``blocks`` blocks: SAME padding rounds up."""
    side = -(-resolution // 2)
    for shape in LITE0_BLOCKS[:blocks]:
        side = -(-side // shape.stride)
    return side
