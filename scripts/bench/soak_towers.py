"""What the soak serves: arrays, texts and pictures, and an engine that fails and hangs as it is told."""

from __future__ import annotations

import io
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
OUTPUTS = {"tower": "y", "text": "embedding", "image": "embedding"}
WORDS = ("red", "green", "blue", "round", "small", "apple", "kettle", "chair", "with", "a", "on", "table")


class FaultyEngine(OnnxRuntimeEngine):
    """Raises for a batch that holds a poisoned sample, as a crashing kernel would; hangs for another.

    ``hung`` has one item a call that hung.
    """

    hung: ClassVar[list[float]] = []

    def _run(self, feeds: Feeds) -> list[Array]:
        if (feeds["x"][:, 0] == POISON).any():
            raise RuntimeError("poisoned")
        if (feeds["x"][:, 0] == HANG).any():
            self.hung.append(time.monotonic())
            time.sleep(HANG_SECONDS)
        return super()._run(feeds)


class Served:
    """Two generations of three towers, ``COUNT`` inputs for each tower, and what the bare engines answer.

    Each generation has weights of its own.
    """

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(7)
        tokenizer = Tokenizer(_tokenizer_file(folder / "tokenizer.json"))
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(COUNT)]
        pictures = [_png(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(COUNT)]
        rows = rng.random((COUNT, WIDTH), dtype=np.float32)
        self.inputs: dict[str, list[Any]] = {
            "tower": [{"x": row} for row in rows],
            "text": texts,
            "image": pictures,
        }
        self.generations = [_generation(folder / str(seed), seed, tokenizer) for seed in range(2)]
        prepared = {
            name: prepare(self.inputs[name])
            for name, tower in self.generations[0].towers.items()
            if (prepare := tower.prepare) is not None
        }
        self.expected: list[dict[str, list[Array]]] = [
            {
                name: _answers(path, prepared.get(name, self.inputs[name]), OUTPUTS[name])
                for name, path in generation.files.items()
            }
            for generation in self.generations
        ]

    def fits(self, generations: Collection[int], tower: str, index: int, answer: Array) -> bool:
        """Say whether an answer is what one of some generations gives."""
        return any(
            np.allclose(answer, self.expected[number][tower][index], rtol=1e-3, atol=1e-4)
            for number in generations
        )

    @staticmethod
    def odd(value: float) -> Sample:
        """Return a sample for ``tower`` that is full of one number."""
        return {"x": np.full(WIDTH, value, np.float32)}


@dataclass(frozen=True)
class Generation:
    """Towers, and the ONNX file of each."""

    towers: dict[str, TowerSource]
    files: dict[str, Path]


def _generation(folder: Path, seed: int, tokenizer: Tokenizer) -> Generation:
    folder.mkdir()
    files = {
        "tower": dense_model(folder / "dense.onnx", 12, seed),
        "text": text_model(folder / "text.onnx", 1, seed),
        "image": picture_model(folder / "picture.onnx", SIDE, 24, 1, "embedding", seed),
    }
    towers = {
        "tower": TowerSource(engine=lambda: FaultyEngine(files["tower"], threads=1)),
        "text": TowerSource(
            engine=lambda: OnnxRuntimeEngine(files["text"], threads=1),
            prepare=text_preparation(tokenizer, LONGEST),
            ragged={"input_ids": tokenizer.pad_id, "attention_mask": 0},
            length_buckets=(8, LONGEST),
        ),
        "image": TowerSource(
            engine=lambda: OnnxRuntimeEngine(files["image"], threads=1),
            prepare=image_preparation(ImagePreprocessing(resolution=SIDE)),
        ),
    }
    return Generation(towers, files)


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
