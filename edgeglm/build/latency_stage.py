"""The latency of every tower, teacher and variants alike, measured in one interleaved run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from edgeglm.adapt.backbones import Backbone, read_backbones
from edgeglm.build.evaluations import read_preprocessing
from edgeglm.compile.contract import variants_of
from edgeglm.core.artifact import Artifact
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.tokenization import Tokenizer
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.protocol import Engine, Feeds
from edgeglm.engines.timing import compare_latency

BATCHES = (1, 8)
_LENGTH = 8  # tokens of a text: a query of a few words


class LatencyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rounds of the interleaved run and threads inside an operator."""

    rounds: int = 15
    threads: int = 1


@dataclass(frozen=True)
class _Chain:
    """A teacher's image side: its backbones, then its head, called one after another."""

    backbones: tuple[tuple[Backbone, OnnxRuntimeEngine], ...]
    head: OnnxRuntimeEngine

    def infer(self, feeds: Feeds) -> dict[str, Any]:
        """Run the whole side; ``feeds`` holds the pixels of each backbone by its file name."""
        rows = [engine.infer({"pixels": feeds[b.file]})["features"] for b, engine in self.backbones]
        return self.head.infer({"features": np.concatenate(rows, axis=1)})


class LatencyStage(Stage[LatencyConfig]):
    """``latency.json``: ``{model: {tower: {batch: median ms}}}``; models: the teacher, each variant."""

    name = "latency"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build.latency_stage",
        "edgeglm.engines.timing",
        "edgeglm.engines.onnxruntime_engine",
    )
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime-gpu", "numpy")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Load everything, then call each in turn."""
        variants = variants_of(inputs["quantize"].files)
        exported = inputs["export"].path
        preprocessing = read_preprocessing(exported)
        side, length = preprocessing.image.resolution, min(_LENGTH, preprocessing.text.max_length)
        vocabulary = Tokenizer(exported / "tokenizer.json").vocabulary_size
        found: dict[str, dict[str, dict[str, float]]] = {}
        with ExitStack() as stack, context.progress.task("Latency", total=len(BATCHES) * 2) as task:

            def opened(path: Path) -> OnnxRuntimeEngine:
                engine = OnnxRuntimeEngine(path, threads=self.config.threads, spinning=False)
                return stack.enter_context(engine)

            folder = inputs["quantize"].path / "models"
            images: dict[str, Any] = {v: opened(folder / v / "image.onnx") for v in variants}
            texts: dict[str, Any] = {v: opened(folder / v / "text.onnx") for v in variants}
            teacher, backbones = inputs["teacher"].path, read_backbones(inputs["backbones"].path)
            images["teacher"] = _Chain(
                tuple((b, opened(inputs["backbones"].path / b.file)) for b in backbones),
                opened(teacher / "image-head.onnx"),
            )
            texts["teacher"] = opened(teacher / "text.onnx")
            rng = np.random.default_rng(0)
            for batch in BATCHES:
                pixels = {"pixels": rng.random((batch, 3, side, side), dtype=np.float32)}
                teacher_pixels = {
                    b.file: rng.random((batch, 3, b.resolution, b.resolution), dtype=np.float32)
                    for b in backbones
                }
                tokens = rng.integers(0, vocabulary, (batch, length))
                words = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
                for tower, engines in (("image", images), ("text", texts)):
                    calls: dict[str, tuple[Engine, Feeds]] = {}
                    for name, engine in engines.items():
                        feeds: Feeds = words if tower == "text" else pixels
                        calls[name] = (engine, teacher_pixels if engine is images["teacher"] else feeds)
                    timed = compare_latency(calls, rounds=self.config.rounds)
                    for name, latency in timed.items():
                        by_batch = found.setdefault(name, {}).setdefault(tower, {})
                        by_batch[str(batch)] = round(latency.median_ms, 4)
                    task.advance()
        (out / "latency.json").write_text(json.dumps(found, indent=1, sort_keys=True))
        return {"latency_ms": found, "threads": self.config.threads}


def latencies_of(artifact: Artifact) -> dict[str, dict[str, dict[str, float]]]:
    """Read ``latency.json``."""
    found: dict[str, dict[str, dict[str, float]]] = json.loads(
        (artifact.path / "latency.json").read_text("utf-8")
    )
    return found
