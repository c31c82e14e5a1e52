"""The door for everybody's own towers: folders of transformers models, read offline.

``load_dual_encoder`` takes CLIP, SigLIP, Chinese-CLIP and ViT+BERT dual encoders with their own
projections; ``load_image_tower`` and ``load_text_tower`` take single models. Nothing is downloaded,
no code of a checkpoint is run, pickles are read with ``weights_only=True``, and a checkpoint that
lacks weights is refused instead of filled with random ones.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.models.hf_towers import HfImageTower, HfTextTower, ImagePooling, TextMask, TextPooling

# Models whose own pooler is what their authors use; the others give the first token, since the
# pooler of a ViT or BERT checkpoint is often missing or belongs to another task.
_IMAGE_POOLING: dict[str, ImagePooling] = {
    "clip_vision_model": "pooler",
    "convnext": "pooler",
    "convnextv2": "pooler",
    "deit": "cls",
    "dinov2": "cls",
    "dinov2_with_registers": "cls",
    "resnet": "pooler",
    "siglip_vision_model": "pooler",
    "swin": "pooler",
    "vit": "cls",
}
_TAKES_INTERPOLATION = {"clip_vision_model", "deit", "siglip_vision_model", "swin", "vit"}
_TEXT_TYPES = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
_DUAL_TYPES: dict[str, tuple[TextPooling, TextMask]] = {
    "chinese_clip": ("cls", "bidirectional"),
    "clip": ("end", "causal"),
    "siglip": ("pooler", "padded"),
    "vision-text-dual-encoder": ("pooler", "bidirectional"),
}
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_ST_POOLING: dict[str, TextPooling] = {"mean": "mean", "cls": "cls", "max": "max"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How the checkpoint's authors feed it, for ``preprocessing.json``; normalisation is in the tower.

    Attributes:
        resolution: Side of the square image, in pixels.
        resample: Name of the filter.
        fit: ``"crop"`` the centre of the scaled image, or ``"stretch"`` to the square.
        max_length: The most tokens.
        lowercase: Whether texts are lowered before the tokenizer (SigLIP's is trained so).
    """

    resolution: int
    resample: str
    fit: Literal["crop", "stretch"]
    max_length: int
    lowercase: bool


def load_dual_encoder(
    folder: Path, *, resolution: int | None = None
) -> tuple[HfImageTower, HfTextTower, Preprocessing]:
    """Load both towers of one checkpoint, each with its own projection into the shared space.

    Args:
        folder: A transformers folder: config.json, weights, preprocessor_config.json, tokenizer.json.
        resolution: Another side of the input than the checkpoint's; position embeddings are interpolated.

    Raises:
        UserError: A file is missing or broken, the architecture is not known, or weights are missing.
    """
    kind = _model_type(folder, _DUAL_TYPES, "dual encoder")
    tokenizer = _tokenizer_path(folder)
    settings = _image_settings(folder)
    model = _model(folder)
    config = model.config
    vision, text = config.vision_config, config.text_config
    if kind == "siglip":
        image_projection, text_projection = nn.Identity(), nn.Identity()
        text_dim = getattr(text, "projection_size", None) or text.hidden_size
        image_dim = vision.hidden_size
    else:
        image_projection, text_projection = model.visual_projection, model.text_projection
        image_dim = text_dim = config.projection_dim
    side = resolution or vision.image_size
    image_tower = HfImageTower(
        model.vision_model,
        image_projection,
        pooling="pooler",
        feature_dim=image_dim,
        resolution=side,
        mean=settings.mean,
        std=settings.std,
        scale=settings.scale,
        interpolate=side != vision.image_size,
    )
    pooling, mask = _DUAL_TYPES[kind]
    text_tower = HfTextTower(
        model.text_model,
        text_projection,
        pooling=pooling,
        mask=mask,
        feature_dim=text_dim,
        max_length=_max_length(folder, text),
        pad_id=_pad_id(text),
        end_id=None if text.eos_token_id == 2 else text.eos_token_id,  # 2 is wrong in older CLIP configs
        tokenizer_path=tokenizer,
    )
    preprocessing = Preprocessing(
        resolution=side,
        resample=settings.resample,
        fit=settings.fit,
        max_length=text_tower.max_length,
        lowercase=kind == "siglip",
    )
    return image_tower.eval(), text_tower.eval(), preprocessing


def is_dual_encoder(folder: Path) -> bool:
    """Say whether a folder holds a checkpoint with both towers. Raises UserError without a config.json."""
    config = _json(folder, "config.json", "give a folder made by save_pretrained, or a snapshot of the hub")
    return config.get("model_type") in _DUAL_TYPES


def is_text_model(folder: Path) -> bool:
    """Say whether a folder holds a text model alone. Raises UserError without a config.json."""
    config = _json(folder, "config.json", "give a folder made by save_pretrained, or a snapshot of the hub")
    return config.get("model_type") in _TEXT_TYPES


def load_image_tower(folder: Path, *, resolution: int | None = None) -> HfImageTower:
    """Load an image model without a text side, such as a ViT or DINOv2; in eval mode, FP32.

    ``resolution`` overrides the side that the checkpoint was made for. Raises as :func:`load_dual_encoder`.
    """
    kind = _model_type(folder, _IMAGE_POOLING, "image model")
    settings = _image_settings(folder)
    pooling = _IMAGE_POOLING[kind]
    model = _model(folder, without_pooler=pooling == "cls")
    native = getattr(model.config, "image_size", None) or settings.side
    side = resolution or settings.side or native
    if not side:
        raise UserError(f"{folder} does not say its image size; pass a resolution")
    dim = model.config.hidden_sizes[-1] if hasattr(model.config, "hidden_sizes") else model.config.hidden_size
    return HfImageTower(
        model,
        nn.Identity(),
        pooling=pooling,
        feature_dim=dim,
        resolution=side,
        mean=settings.mean,
        std=settings.std,
        scale=settings.scale,
        interpolate=kind in _TAKES_INTERPOLATION and side != native,
    ).eval()


def load_text_tower(folder: Path) -> HfTextTower:
    """Load a text model without an image side, such as a BERT or a sentence-transformers folder.

    The pooling is the one of ``1_Pooling/config.json`` where there is one, else the first token. A
    final normalisation is left to whoever makes the embedding. In eval mode, FP32. Raises as
    :func:`load_dual_encoder`.
    """
    _model_type(folder, _TEXT_TYPES, "text model")
    tokenizer = _tokenizer_path(folder)
    pooling = _sentence_pooling(folder)
    model = _model(folder, without_pooler=True)
    return HfTextTower(
        model,
        nn.Identity(),
        pooling=pooling,
        mask="bidirectional",
        feature_dim=model.config.hidden_size,
        max_length=_max_length(folder, model.config),
        pad_id=_pad_id(model.config),
        end_id=None,
        tokenizer_path=tokenizer,
    ).eval()


def _model(folder: Path, *, without_pooler: bool = False) -> Any:
    """Load the whole model in FP32 with eager attention, refusing absent or mismatched weights."""
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        with _quiet_transformers():
            model, loading = AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the model in {folder}: {reason}; fetch the folder again") from error
    missing = sorted(
        name for name in loading["missing_keys"] if not (without_pooler and name.startswith("pooler."))
    )
    if missing:
        raise UserError(
            f"the weights in {folder} lack {len(missing)} tensors that config.json asks for "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); "
            "use a complete checkpoint of that architecture"
        )
    if without_pooler and getattr(model, "pooler", None) is not None:
        model.pooler = None  # its output is not used, so its weights are not carried
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and tables; what they say is checked and raised here."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _model_type(folder: Path, known: Any, what: str) -> str:
    config = _json(folder, "config.json", "give a folder made by save_pretrained, or a snapshot of the hub")
    kind = config.get("model_type")
    if kind not in known:
        raise unknown_name(
            f"architecture of {what} (model_type in {folder / 'config.json'})", str(kind), known
        )
    return str(kind)


def _tokenizer_path(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no tokenizer.json; write one with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})"
        )
    return path


@dataclass(frozen=True, kw_only=True)
class _ImageSettings:
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float
    side: int | None
    resample: str
    fit: Literal["crop", "stretch"]


def _image_settings(folder: Path) -> _ImageSettings:
    remedy = "copy preprocessor_config.json from the model's page: it holds the normalisation"
    if (folder / "preprocessor_config.json").is_file() or not (folder / "processor_config.json").is_file():
        config = _json(folder, "preprocessor_config.json", remedy)
    else:  # how transformers 5 saves a processor
        config = _json(folder, "processor_config.json", remedy).get("image_processor", {})
    normalised = config.get("do_normalize", True)
    mean = _three_numbers(config.get("image_mean")) if normalised else (0.0, 0.0, 0.0)
    std = _three_numbers(config.get("image_std")) if normalised else (1.0, 1.0, 1.0)
    if mean is None or std is None or 0.0 in std:
        raise UserError(f"{folder} gives no image_mean and image_std of three numbers; {remedy}")
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    crop = config.get("do_center_crop", False)
    return _ImageSettings(
        mean=mean,
        std=std,
        scale=factor * 255,
        side=_side(config.get("crop_size") if crop else config.get("size")),
        resample=_RESAMPLING.get(config.get("resample", 3), "bicubic"),
        fit="crop" if crop else "stretch",
    )


def _three_numbers(value: Any) -> tuple[float, float, float] | None:
    try:
        first, second, third = (float(number) for number in value)
    except (TypeError, ValueError):
        return None
    return first, second, third


def _side(size: Any) -> int | None:
    found = (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size
    return found if isinstance(found, int) else None


def _sentence_pooling(folder: Path) -> TextPooling:
    if (folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        if extra := sorted({*kinds} - {"Transformer", "Pooling", "Normalize"}):
            raise UserError(
                f"{folder} adds {', '.join(extra)} after the pooling, which is not carried over; "
                "use a model that ends in its pooling"
            )
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "cls"
    config = _json(folder, "1_Pooling/config.json", "fetch the folder again")
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    mode = config.get("pooling_mode") or "+".join(on)
    mode = str(mode).replace("pooling_mode_", "").replace("_tokens", "").replace("_token", "")
    if mode not in _ST_POOLING:
        raise unknown_name(f"pooling in {path}", mode, _ST_POOLING)
    return _ST_POOLING[mode]


def _max_length(folder: Path, text_config: Any) -> int:
    """Return the least of what the positions hold and what the tokenizer and the pooling were set to."""
    most = int(text_config.max_position_embeddings)
    if text_config.model_type in ("camembert", "roberta", "xlm-roberta"):
        most -= int(text_config.pad_token_id) + 1  # these count positions from behind the padding
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        if (folder / name).is_file():
            value = _json(folder, name, "fetch the folder again").get(key)
            if isinstance(value, int) and value > 0:
                most = min(most, value)
    return most


def _pad_id(text_config: Any) -> int:
    return 0 if text_config.pad_token_id is None else int(text_config.pad_token_id)


def _json(folder: Path, name: str, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {name}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / name}: {error}; {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{folder / name} is not a JSON object; {remedy}")
    return found
