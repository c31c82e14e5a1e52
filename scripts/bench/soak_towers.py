"""What the soak serves: arrays, texts and pictures, and an engine that fails and hangs as it is told."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
from runner_models import WIDTH, dense_model, picture_model, text_model

from edgeglm.data.tokenization import Tokenizer
from edgeglm.data.transforms import ImagePreprocessing
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.protocol import Array, Feeds
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.requests import Sample
from edgeglm.runtime.towers import image_preparation, text_preparation

POISON, NOT_FINITE, HANG = 666.0, float("nan"), 777.0
HANG_SECONDS = 15.0  # what a hung call takes; the watchdog is quicker
SIDE, LONGEST, COUNT = 32, 16, 64
WORDS = ("red", "green", "blue", "round", "small", "apple", "kettle", "chair", "with", "a", "on", "table")


class FaultyEngine(OnnxRuntimeEngine):
    """Raises for a batch that holds a poisoned sample, as a crashing kernel would; hangs for another."""

    def _run(self, feeds: Feeds) -> list[Array]:
        if (feeds["x"][:, 0] == POISON).any():
            raise RuntimeError("poisoned")
        if (feeds["x"][:, 0] == HANG).any():
            time.sleep(HANG_SECONDS)
        return super()._run(feeds)


class Served:
    """Three towers, ``COUNT`` inputs for each, and what the bare engines answer to them."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(7)
        dense = dense_model(folder / "dense.onnx", 12)
        text = text_model(folder / "text.onnx", 1)
        picture = picture_model(folder / "picture.onnx", SIDE, 24, 1, "embedding")
        tokenizer = Tokenizer(_tokenizer_file(folder / "tokenizer.json"))
        preprocessing = ImagePreprocessing(resolution=SIDE)
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(COUNT)]
        pictures = [_png(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(COUNT)]
        prepare_texts, prepare_pictures = (
            text_preparation(tokenizer, LONGEST),
            image_preparation(preprocessing),
        )
        self.towers = {
            "tower": TowerSource(engine=lambda: FaultyEngine(dense, threads=1)),
            "text": TowerSource(
                engine=lambda: OnnxRuntimeEngine(text, threads=1),
                prepare=prepare_texts,
                ragged={"input_ids": tokenizer.pad_id, "attention_mask": 0},
                length_buckets=(8, LONGEST),
            ),
            "image": TowerSource(
                engine=lambda: OnnxRuntimeEngine(picture, threads=1), prepare=prepare_pictures
            ),
        }
        rows = rng.random((COUNT, WIDTH), dtype=np.float32)
        self.inputs: dict[str, list[Any]] = {
            "tower": [{"x": row} for row in rows],
            "text": texts,
            "image": pictures,
        }
        self.expected: dict[str, list[Array]] = {
            "tower": _answers(dense, [{"x": row} for row in rows], "y"),
            "text": _answers(text, prepare_texts(texts), "embedding"),
            "image": _answers(picture, prepare_pictures(pictures), "embedding"),
        }

    @staticmethod
    def odd(value: float) -> Sample:
        """Return a sample for ``tower`` that is full of one number."""
        return {"x": np.full(WIDTH, value, np.float32)}


def _answers(path: Path, samples: Any, output: str) -> list[Array]:
    with OnnxRuntimeEngine(path, threads=1) as engine:
        return [
            engine.infer({name: np.asarray(array)[None] for name, array in sample.items()})[output][0]
            for sample in samples
        ]


def _png(pixels: Array) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _tokenizer_file(path: Path) -> Path:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    backend: Any = Backend(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(path))
    return path
