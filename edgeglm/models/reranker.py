"""The fused re-ranker: one Transformer reads the patches of an image and the tokens of a text together.

Two towers meet only in a cosine; here every token looks at every patch (the fusion of ALBEF, Li et al.,
2021, and FLAVA, Singh et al., 2022; one stream as in UNITER, Chen et al., 2020). It costs a pass a pair, so
it sees only the first candidates. What it says is added to their cosine, and it begins by saying nothing.
It is read from a token of its own and from the product of both halves: the first alone learns too slowly.

Shapes: B pairs, N patches, C channels of a patch, L tokens, W width, R resolution, D embedding dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.models.projection import normalized
from edgeglm.models.students import MASKED, ImageTower, StudentImageTower, TextLayer

_HEAD = 32  # width of an attention head, or more where a width is no multiple of it


class FusedReranker(nn.Module):
    """Patches [B, N, C], ids and mask int64 [B, L], cosine [B] -> score [B, 1]."""

    def __init__(
        self,
        *,
        table_VE: Tensor,
        patches: int,
        channels: int,
        max_length: int,
        width: int,
        depth: int,
    ) -> None:
        """Make it around the student's table of token embeddings, [V, E], which stays as it is."""
        super().__init__()
        entries, factor = table_VE.shape
        self.tokens = nn.Embedding(entries, factor, _weight=table_VE.clone(), _freeze=True)
        self.widen = nn.Linear(factor, width)
        self.take = nn.Linear(channels, width)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(max_length, width))
        self.patch_places = nn.Parameter(torch.zeros(patches, width))
        for table in (self.first, self.places, self.patch_places):
            nn.init.trunc_normal_(table, std=0.02)
        self.norm = nn.LayerNorm(width)
        heads = next(count for count in range(max(1, width // _HEAD), 0, -1) if width % count == 0)
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(depth))
        self.last_norm = nn.LayerNorm(width)
        self.judge = nn.Linear(2 * width, 1)
        nn.init.zeros_(self.judge.weight)
        nn.init.zeros_(self.judge.bias)

    def forward(self, patches: Tensor, input_ids: Tensor, attention_mask: Tensor, cosine: Tensor) -> Tensor:
        """Score pairs; masked tokens change nothing."""
        seen_BNW = self.take(patches) + self.patch_places
        read_BLW = self.widen(self.tokens(input_ids)) + self.places[: input_ids.shape[1]]
        first_B1W = self.first.expand(patches.shape[0], -1, -1)
        x_BSW = self.norm(torch.cat([first_B1W, seen_BNW, read_BLW], 1))
        mask_BL = attention_mask.to(x_BSW.dtype)
        all_BN = torch.ones_like(patches[:, :, 0])
        bias_B11S = (1.0 - torch.cat([all_BN[:, :1], all_BN, mask_BL], 1))[:, None, None] * MASKED
        for layer in self.layers:
            x_BSW = layer(x_BSW, bias_B11S)
        x_BSW, mask_BL1, count = self.last_norm(x_BSW), mask_BL[:, :, None], patches.shape[1]
        image_BW = x_BSW[:, 1 : count + 1].mean(1)
        text_BW = (x_BSW[:, count + 1 :] * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1.0)
        judged: Tensor = self.judge(torch.cat([x_BSW[:, 0], image_BW * text_BW], 1))
        return cosine[:, None] + judged


class PatchTower(nn.Module):
    """Pixels float32 [B, 3, R, R] -> the image tower's patches [B, N, C], before they become an embedding."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        """Return what the tower flattens and projects."""
        tower = self.tower
        if isinstance(tower, StudentImageTower):
            x_BCHW = F.relu6(tower.norm(tower.squeeze(tower.trunk(pixels)[0])))
            return x_BCHW.flatten(2).transpose(1, 2)
        x_BNW = tower.cut(pixels * 2.0 - 1.0).flatten(2).transpose(1, 2) + tower.places
        seen_B11N = x_BNW.new_zeros(1, 1, 1, x_BNW.shape[1])
        for layer in tower.layers:
            x_BNW = layer(x_BNW, seen_B11N)
        return F.gelu(tower.squeeze(tower.last_norm(x_BNW)))

    def embedding(self, patches_BNC: Tensor) -> Tensor:
        """Return what the tower makes of its patches: [B, D], of length one."""
        if isinstance(self.tower, StudentImageTower):
            patches_BNC = patches_BNC.transpose(1, 2)  # it flattens channels first
        return normalized(self.tower.project(patches_BNC.flatten(1)))
