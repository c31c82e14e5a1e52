"""Towers around transformers models: pixels or tokens in, one feature vector out.

The wrappers fix what the checkpoint's authors fixed (normalisation, pooling, padding), so that a
caller needs nothing but the agreed inputs. Attention masks are plain additive ones, built here:
transformers 5 would build its own from Range, GatherND, And and Expand, which ONNX parsers take badly.

Shapes: B batch, C = 3 channels, R resolution, L tokens, H hidden size, F feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

ImagePooling = Literal["pooler", "cls"]
TextPooling = Literal["pooler", "cls", "mean", "max", "end"]
TextMask = Literal["bidirectional", "causal", "padded"]

# Exactly 0 after softmax in FP32 and FP16 alike, and two of them still fit into FP16.
MASKED = -1e4


class HfImageTower(nn.Module):
    """An image model of transformers with its normalisation inside.

    Attributes:
        backbone: The transformers model.
        projection: The checkpoint's own projection, or an identity.
        feature_dim: F.
        resolution: R; the side of the square input.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Module,
        *,
        pooling: ImagePooling,
        feature_dim: int,
        resolution: int,
        mean: Sequence[float],
        std: Sequence[float],
        scale: float,
        interpolate: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.pooling = pooling
        self.feature_dim = feature_dim
        self.resolution = resolution
        self.interpolate = interpolate
        centre, spread = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self.register_buffer("gain", scale / spread, persistent=False)
        self.register_buffer("shift", -centre / spread, persistent=False)
        self.gain: Tensor
        self.shift: Tensor

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features float32 [B, F] of RGB pixels float32 [B, 3, R, R] in [0, 1]."""
        x_BCRR = pixels * self.gain + self.shift
        if self.interpolate:
            found = self.backbone(pixel_values=x_BCRR, interpolate_pos_encoding=True)
        else:
            found = self.backbone(pixel_values=x_BCRR)
        pooled = found.last_hidden_state[:, 0] if self.pooling == "cls" else found.pooler_output
        features: Tensor = self.projection(pooled.flatten(1))
        return features


class HfTextTower(nn.Module):
    """A text model of transformers with its pooling inside.

    Attributes:
        encoder: The transformers model; LoRA finds its layers in here.
        projection: The checkpoint's own projection, or an identity.
        feature_dim: F.
        max_length: The most tokens that the model takes.
        pad_id: The token that fills up short texts.
        end_id: The token whose first place is read under ``"end"`` pooling; None for the largest id.
        tokenizer_path: The checkpoint's ``tokenizer.json``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projection: nn.Module,
        *,
        pooling: TextPooling,
        mask: TextMask,
        feature_dim: int,
        max_length: int,
        pad_id: int,
        end_id: int | None,
        tokenizer_path: Path,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection
        self.pooling = pooling
        self.mask = mask
        self.feature_dim = feature_dim
        self.max_length = max_length
        self.pad_id = pad_id
        self.end_id = end_id
        self.tokenizer_path = tokenizer_path
        causal = torch.full((max_length, max_length), MASKED).triu(1) if mask == "causal" else torch.zeros(0)
        self.register_buffer("causal", causal, persistent=False)
        self.causal: Tensor

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return features float32 [B, F] of int64 [B, L] tokens and their mask, L at most ``max_length``."""
        if self.mask == "padded":
            found = self._padded(input_ids, attention_mask)
        else:
            found = self.encoder(input_ids=input_ids, attention_mask=self.additive(attention_mask))
        features: Tensor = self.projection(self._pooled(found, input_ids, attention_mask))
        return features

    def additive(self, mask_BL: Tensor) -> Tensor:
        """Return 0 where a token may be looked at and MASKED where not: [B, 1, 1, L] or [B, 1, L, L]."""
        added = (1.0 - mask_BL[:, None, None, :].to(torch.float32)) * MASKED
        if self.mask == "causal":
            length = mask_BL.shape[1]
            added = added + self.causal[None, None, :length, :length]
        return added

    def _padded(self, ids_BL: Tensor, mask_BL: Tensor) -> Any:
        """Run a model that was trained on texts filled up to its full length, without a mask (SigLIP)."""
        ids_BL = torch.where(mask_BL > 0, ids_BL, self.pad_id)
        # Filled by the full length and then cut: the shape is fixed whatever L is, which exports well.
        filled = pad(ids_BL, (0, self.max_length), value=self.pad_id)[:, : self.max_length]
        return self.encoder(input_ids=filled)

    def _pooled(self, found: Any, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        if self.pooling == "pooler":
            pooled: Tensor = found.pooler_output
            return pooled
        hidden_BLH: Tensor = found.last_hidden_state
        if self.pooling == "cls":
            return hidden_BLH[:, 0]
        if self.pooling == "end":
            place_B = (ids_BL if self.end_id is None else (ids_BL == self.end_id).int()).argmax(1)
            # transformers indexes with two tensors here, which becomes a GatherND.
            index_B1H = place_B[:, None, None].expand(-1, 1, hidden_BLH.shape[2])
            return hidden_BLH.gather(1, index_B1H).squeeze(1)
        mask_BL1 = mask_BL[:, :, None].to(hidden_BLH.dtype)
        if self.pooling == "max":
            return (hidden_BLH + (1.0 - mask_BL1) * MASKED).amax(1)
        return (hidden_BLH * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1.0)
