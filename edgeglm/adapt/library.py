"""The teacher as a library: pretrained towers with heads, in a training loop of one's own.

    import torch
    import edgeglm

    model = edgeglm.from_pretrained("minilm-l6", image="efficientnet-lite0")
    model.enable_lora(rank=8, dropout=0.1)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)
    schedule = edgeglm.AdaptiveLR(optimizer, warmup_steps=500)
    for pixels, texts in batches:  # float32 [B, 3, R, R] in [0, 1], and B strings
        loss = model.contrastive_loss(pixels, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.merge()

Shapes: B batch, R resolution, F features, D embedding dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeglm.adapt.backbones import image_module
from edgeglm.adapt.sources import source_spec
from edgeglm.adapt.targets import chosen_targets
from edgeglm.adapt.text_teacher import TextTeacher, linear_names, load_text_teacher, require_untuned
from edgeglm.adapt.tuning import enable_tuning, merge_tuning, require_blocks
from edgeglm.assets import fetch_asset
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.store import Store, default_store_root
from edgeglm.models.projection import ProjectionHead

_PROBE = ("a red circle", "an apple", "two people on a boat in the rain")


class PretrainedModel(nn.Module):
    """Two pretrained towers, frozen, with heads into one space. Texts are strings.

    Attributes:
        text: The text tower with its tokenizer.
        image: The image tower, pixels [B, 3, R, R] -> [B, F], or None.
        resolution: R, 0 without an image tower.
        text_head: Features -> embedding; it trains.
        image_head: The same for images.
    """

    def __init__(self, text: TextTeacher, image: nn.Module | None, resolution: int, dimensions: int) -> None:
        super().__init__()
        self.text = text
        self.text_tower = text.tower
        self.image = image
        self.resolution = resolution
        self.text_tower.requires_grad_(False)
        self.text_head = _head(text.tower.feature_dim, dimensions)
        self.image_head: ProjectionHead | None = None
        if image is not None:
            image.requires_grad_(False)
            with torch.no_grad():
                width = int(image(torch.zeros(1, 3, resolution, resolution)).shape[1])
            self.image_head = _head(width, dimensions)

    def enable_lora(
        self,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.1,
        targets: Sequence[str] = (),
        last_blocks: int = 0,
    ) -> PretrainedModel:
        """Put low-rank adapters on the text tower (Hu et al., 2022) and return the model.

        Args:
            rank: Of the adapters.
            alpha: They are scaled by alpha / rank.
            dropout: Before the adapters.
            targets: Names of the linear layers that get one; by default the query and value layers.
            last_blocks: Only so many last blocks; 0 for all.

        Raises:
            UserError: No layer has such a name; the message lists those that exist. Or adapters are there
                already, or a number is none that adapters could have.
        """
        if not (rank >= 1 and 0.0 <= dropout < 1.0 and 0.0 < alpha < math.inf):
            raise UserError(
                f"rank is {rank}, alpha {alpha} and dropout {dropout}; "
                "give a rank from 1, an alpha above 0 and a dropout below 1"
            )
        targets = (targets,) if isinstance(targets, str) else targets
        encoder = self.text.tower.encoder
        require_untuned(encoder)
        chosen_targets(targets, linear_names(encoder), type(encoder).__name__, key="targets")
        if last_blocks:
            require_blocks(encoder, last_blocks, key="last_blocks", remedy="last_blocks = 0")
        settings = TeacherConfig(
            lora_rank=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            lora_targets=tuple(targets),
            tuned_blocks=last_blocks,
        )
        enable_tuning(self.text, settings)
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what trains: heads, and adapters once they are enabled."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings float32 [B, D], of length one. ValueError for no text, or for one by itself."""
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts are {texts!r}; give a list of one or more strings")
        embedded: Tensor = self.text_head(self.text.features(texts))
        return embedded

    def embed_image(self, pixels_B3RR: Tensor) -> Tensor:
        """Return embeddings float32 [B, D] of pixels in [0, 1].

        Raises:
            ValueError: There is no image tower, or pixels are whole numbers, as a decoder gives them.
        """
        if self.image is None or self.image_head is None:
            raise ValueError("this model has no image tower; give from_pretrained an image model")
        if not pixels_B3RR.is_floating_point():
            raise ValueError(f"pixels are {pixels_B3RR.dtype}; give floats in [0, 1]: pixels / 255")
        self.image.eval()  # frozen, its statistics too
        embedded: Tensor = self.image_head(self.image(pixels_B3RR))
        return embedded

    def forward(self, pixels_B3RR: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both, each [B, D]."""
        return self.embed_image(pixels_B3RR), self.embed_text(texts)

    def contrastive_loss(
        self, pixels_B3RR: Tensor, texts: Sequence[str], *, temperature: float = 0.05
    ) -> Tensor:
        """Return InfoNCE over the batch, both ways (Radford et al., CLIP, 2021). Equal texts count as one.

        Raises:
            ValueError: There are not as many texts as images.
        """
        if len(pixels_B3RR) != len(texts):
            raise ValueError(f"{len(pixels_B3RR)} images and {len(texts)} texts; give one text an image")
        image_BD, text_BD = self(pixels_B3RR, texts)
        scores_BB = image_BD @ text_BD.T / temperature
        alike = [[float(one == other) for other in texts] for one in texts]
        alike_BB = torch.tensor(alike, device=scores_BB.device)
        share_BB = alike_BB / alike_BB.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(scores_BB, share_BB) + F.cross_entropy(scores_BB.T, share_BB))

    def merge(self) -> float:
        """Fold the adapters into the text tower; return the largest change of its features (at most 1e-5)."""
        return merge_tuning(self.text, _PROBE)


def from_pretrained(
    text: str | Path = "minilm-l6",
    *,
    image: str | Path | None = None,
    resolution: int = 0,
    embedding_dim: int = 256,
    max_length: int = 32,
    store: str | Path | None = None,
) -> PretrainedModel:
    """Load pretrained towers, fetching them once, and put fresh heads on them.

    Args:
        text: A pinned asset, ``hf:owner/name``, or a local folder of transformers.
        image: The same for the image tower; None for texts only.
        resolution: Side of the images in pixels; 0 for the model's own.
        embedding_dim: D.
        max_length: The most tokens of a text.
        store: Where fetched models are kept; ``$EDGEGLM_STORE`` or the user's cache by default.

    Raises:
        UserError: A name is unknown, a model is of a kind that is not, or nothing fits a number.
    """
    if embedding_dim < 1 or max_length < 2 or resolution < 0:
        raise UserError(
            f"embedding_dim is {embedding_dim}, max_length {max_length} and resolution {resolution}; give at "
            "least 1, 2 and 0"
        )
    text, image = _named(text), None if image is None else _named(image)
    kept, progress = Store(Path(store or default_store_root())), QuietProgress()
    found: nn.Module | None = None
    side = 0
    if image is not None:
        found, side = image_module(image, fetch_asset(source_spec(image), kept, progress), resolution)
    source = fetch_asset(source_spec(text), kept, progress)
    with TemporaryDirectory(prefix="edgeglm-") as scratch:
        teacher = load_text_teacher(text, source, Path(scratch) / "text", max_length=max_length)
    return PretrainedModel(teacher, found, side, embedding_dim)


def _named(model: str | Path) -> str:
    return str(model.absolute()) if isinstance(model, Path) else model


def _head(features: int, dimensions: int) -> ProjectionHead:
    return ProjectionHead(features, dimensions, hidden=2 * dimensions, input_dropout=0.0, dropout=0.1)
