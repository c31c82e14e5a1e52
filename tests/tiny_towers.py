"""Pretrained towers small enough to be made on the spot, and a project that builds a bundle from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.synthetic import COLOURS, SHAPES, write_synthetic_folder

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
#: What the captions say, and ordinary words besides.
WORDS = (*COLOURS, *SHAPES, "a", "apple", "river", "stone", "cloud", "window", "paper", "garden", "music")

RECIPE = """
name = "tiny"
[data]
source = "folder"
path = "data"
image_size = 32
unseen_fraction = 0.3
[teacher]
image = ["{root}/vit"]
text = "{root}/bert"
resolution = 32
views = 1
embedding_dim = 32
hidden = 64
warmup_epochs = 1
epochs = 1
batch_size = 16
lora_epochs = 1
lora_batch_size = 16
[student]
size = "edge-xs"
inherit = ""
resolution = 32
max_length = 6
image_epochs = 1
image_batch_size = 16
corpus = 40
anchors = 10
caption_repeats = 1
text_epochs = 1
text_batch_size = 16
[quantize]
calibration_samples = 8
[gates]
teacher_map10 = 0.0
student_ratio = 0.0
quantized_ratio = 0.0
[pack]
goldens = 3
"""


def write_wordpiece(path: Path, words: tuple[str, ...] = WORDS) -> Path:
    """Write a ``tokenizer.json`` of whole words as BERT has it; return ``path``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {entry: index for index, entry in enumerate((*SPECIAL, *words))}
    tokenizer: Any = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path))
    return path


def write_bert(folder: Path) -> Path:
    """Write a text model of random weights that pools by the mean; return ``folder``."""
    from transformers import BertConfig, BertModel

    words = (*WORDS, "[MASK]")
    config = BertConfig(**_sizes(), vocab_size=len(SPECIAL) + len(words), max_position_embeddings=32)
    _save(BertModel, config, folder)
    write_wordpiece(folder / "tokenizer.json", words)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def write_vit(folder: Path) -> Path:
    """Write an image model of random weights for 32 pixels; return ``folder``."""
    from transformers import ViTConfig, ViTModel

    _save(ViTModel, ViTConfig(**_sizes(), image_size=32, patch_size=8), folder)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def write_clip(folder: Path) -> Path:
    """Write a dual encoder of random weights for 32 pixels, with causal texts; return ``folder``."""
    from transformers import CLIPConfig, CLIPModel

    words = len(SPECIAL) + len(WORDS)
    text = {**_sizes(), "vocab_size": words, "max_position_embeddings": 32}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**_sizes(), "image_size": 32, "patch_size": 8}
    _save(
        CLIPModel, CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=24), folder
    )
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    write_wordpiece(folder / "tokenizer.json")
    return folder


def write_project(root: Path) -> Path:
    """Write towers, 64 pictures with captions and ``recipe.toml``; return ``root``. Equal at each call."""
    write_vit(root / "vit")
    write_bert(root / "bert")
    write_synthetic_folder(root / "data", count=64, size=32)
    (root / "recipe.toml").write_text(RECIPE.format(root=root))
    return root


def _sizes() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }


def _save(kind: Any, config: Any, folder: Path) -> None:
    import torch
    from transformers.utils import logging as untyped

    logging: Any = untyped
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).eval().save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
