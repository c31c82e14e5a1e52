"""The latency of towers as a build measures it: which feeds, which batches, and a teacher as one chain."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeglm.adapt.backbones import Backbone, read_backbones
from edgeglm.core.artifact import Artifact
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.protocol import Engine, Feeds
from edgeglm.engines.timing import compare_latency

BATCHES = (1, 8)
LENGTH = 8  # tokens of a text: a query of a few words
ROUNDS = 15

#: Median milliseconds of a call by tower and batch: ``{"image": {"1": 0.9, "8": 4.6}, "text": ...}``.
Milliseconds = dict[str, dict[str, float]]


@dataclass(frozen=True)
class TeacherImages:
    """A teacher's image side: its backbones, then its head, called one after another."""

    backbones: tuple[tuple[Backbone, OnnxRuntimeEngine], ...]
    head: OnnxRuntimeEngine

    def infer(self, feeds: Feeds) -> dict[str, Any]:
        """Run the whole side; ``feeds`` holds the pixels of each backbone by its file name."""
        rows = [engine.infer({"pixels": feeds[b.file]})["features"] for b, engine in self.backbones]
        return self.head.infer({"features": np.concatenate(rows, axis=1)})

    def feeds(self, batch: int) -> dict[str, Any]:
        """Return random pixels for each backbone, at its resolution."""
        return {b.file: image_feeds(b.resolution, batch)["pixels"] for b, _ in self.backbones}


def opened_teacher(
    stack: ExitStack, backbones: Artifact, teacher: Artifact, *, threads: int
) -> tuple[TeacherImages, OnnxRuntimeEngine]:
    """Load a teacher's image side and its text tower; ``stack`` closes them."""

    def opened(path: Any) -> OnnxRuntimeEngine:
        return stack.enter_context(OnnxRuntimeEngine(path, threads=threads, spinning=False))

    chain = TeacherImages(
        tuple((b, opened(backbones.path / b.file)) for b in read_backbones(backbones.path)),
        opened(teacher.path / "image-head.onnx"),
    )
    return chain, opened(teacher.path / "text.onnx")


def image_feeds(resolution: int, batch: int) -> dict[str, Any]:
    """Return random pixels, float32 [batch, 3, resolution, resolution]."""
    return {"pixels": np.random.default_rng(0).random((batch, 3, resolution, resolution), dtype=np.float32)}


def text_feeds(vocabulary: int, batch: int, length: int) -> dict[str, Any]:
    """Return random ids and a full mask, int64 [batch, length]."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def tower_milliseconds(
    calls: Mapping[str, Mapping[str, tuple[Engine, Mapping[int, Feeds]]]], *, rounds: int = ROUNDS
) -> dict[str, Milliseconds]:
    """Time models tower by tower and batch by batch, all models of a tower interleaved.

    Args:
        calls: ``{tower: {model: (engine, feeds by batch)}}``.
        rounds: Calls of each after the warm-up.

    Returns:
        ``{model: {tower: {batch: median ms}}}``.
    """
    found: dict[str, Milliseconds] = {}
    for batch in BATCHES:
        for tower, models in calls.items():
            timed = compare_latency(
                {name: (engine, feeds[batch]) for name, (engine, feeds) in models.items()}, rounds=rounds
            )
            for name, latency in timed.items():
                by_batch = found.setdefault(name, {}).setdefault(tower, {})
                by_batch[str(batch)] = round(latency.median_ms, 4)
    return found


def both_towers(latency: Milliseconds, batch: int) -> float:
    """Return the milliseconds of one call of each tower at a batch, together."""
    return sum(by_batch[str(batch)] for by_batch in latency.values())
