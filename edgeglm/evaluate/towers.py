"""Embeddings of ONNX towers in ONNX Runtime: what is evaluated is the very file that travels.

Shapes: N images, R resolution, T texts, L tokens, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeglm.data.tokenization import Tokenizer
from edgeglm.data.transforms import ImagePreprocessing, model_input_from_pixels
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.retrieval import TrackLike, TrackMetrics, evaluate_tracks

FloatRows = npt.NDArray[np.float32]
BATCH = 64


class PixelSource(Protocol):
    """Stored images: ``source[indices]`` gives uint8 [n, S, S, 3]; a memory map is one."""

    def __getitem__(self, key: Any, /) -> Any:
        """Return the chosen images."""

    def __len__(self) -> int:
        """Return the number of images."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How texts become tokens for a tower."""

    tokenizer: Tokenizer
    max_length: int


def image_embeddings(
    path: Path,
    images: PixelSource,
    chosen: Sequence[int],
    *,
    preprocessing: ImagePreprocessing,
    threads: int,
    integers: bool = True,
) -> FloatRows:
    """Embed the chosen images with an image tower. Returns float32 [len(chosen), D].

    ``integers`` is as in :class:`OnnxRuntimeEngine`.
    """
    rows = []
    with OnnxRuntimeEngine(path, threads=threads, spinning=False, integers=integers) as engine:
        for start in range(0, len(chosen), BATCH):
            pixels = np.asarray(images[list(chosen[start : start + BATCH])])
            feeds = {
                "pixels": model_input_from_pixels(
                    pixels, preprocessing.resolution, margin=preprocessing.margin
                )
            }
            rows.append(np.asarray(engine.infer(feeds)["embedding"], np.float32))
    return np.concatenate(rows)


def text_embeddings(
    path: Path, texts: Sequence[str], settings: TextSettings, *, threads: int, integers: bool = True
) -> FloatRows:
    """Embed texts with a text tower, those of one length together. Returns float32 [T, D].

    ``integers`` is as in :class:`OnnxRuntimeEngine`.
    """
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    out: FloatRows | None = None
    with OnnxRuntimeEngine(path, threads=threads, spinning=False, integers=integers) as engine:
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            ids, mask = settings.tokenizer.encode([texts[i] for i in batch], max_length=settings.max_length)
            rows = np.asarray(
                engine.infer({"input_ids": ids, "attention_mask": mask})["embedding"], np.float32
            )
            out = np.empty((len(texts), rows.shape[1]), np.float32) if out is None else out
            out[batch] = rows
    return np.zeros((0, 0), np.float32) if out is None else out


def token_embeddings(
    path: Path, tokenizer: Tokenizer, entries: npt.NDArray[np.int64], *, threads: int
) -> FloatRows:
    """Embed the entries of the vocabulary with these ids as texts of their own. Returns float32 [n, D]."""
    ids = tokenizer.lone_tokens()[entries]
    rows = []
    with OnnxRuntimeEngine(path, threads=threads, spinning=False) as engine:
        for batch in np.array_split(ids, -(-len(ids) // (4 * BATCH))):
            found = engine.infer({"input_ids": batch, "attention_mask": np.ones_like(batch)})
            rows.append(np.asarray(found["embedding"], np.float32))
    return np.concatenate(rows)


def gallery_images(tracks: Sequence[TrackLike]) -> list[int]:
    """Return every image that some track's gallery holds, ascending: all that an evaluation embeds."""
    return sorted({image for track in tracks for image in track.gallery})


def towers_on_tracks(
    towers: Mapping[str, Path],
    tracks: Sequence[TrackLike],
    images: PixelSource,
    *,
    preprocessing: ImagePreprocessing,
    text: TextSettings,
    threads: int,
    seed: int = 0,
    precisions: MutableMapping[str, npt.NDArray[np.float64]] | None = None,
) -> tuple[dict[str, TrackMetrics], FloatRows]:
    """Evaluate the files ``{"image": path, "text": path}`` on every track.

    ``precisions`` is filled with AP@10 of each query by track.

    Returns:
        The metrics by track, and the embeddings float32 [N, D] of all N images, zero where no gallery
        holds the image.

    Raises:
        UnusableEmbeddingsError: A tower gives NaN or infinity.
    """
    chosen = gallery_images(tracks)
    embedded = image_embeddings(towers["image"], images, chosen, preprocessing=preprocessing, threads=threads)
    rows = np.zeros((len(images), embedded.shape[1]), np.float32)
    rows[chosen] = embedded
    metrics = evaluate_tracks(
        tracks,
        lambda texts: text_embeddings(towers["text"], texts, text, threads=threads),
        rows,
        seed=seed,
        precisions=precisions,
    )
    return metrics, rows
