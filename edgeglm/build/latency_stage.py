"""The latency of every tower, teacher and variants alike, measured in one interleaved run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from edgeglm.build.evaluations import read_preprocessing
from edgeglm.build.timed_towers import (
    BATCHES,
    LENGTH,
    ROUNDS,
    Milliseconds,
    image_feeds,
    opened_teacher,
    text_feeds,
    tower_milliseconds,
)
from edgeglm.compile.contract import variants_of
from edgeglm.core.artifact import Artifact
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.tokenization import Tokenizer
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine


class LatencyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rounds of the interleaved run and threads inside an operator."""

    rounds: int = ROUNDS
    threads: int = 1


class LatencyStage(Stage[LatencyConfig]):
    """``latency.json``: ``{model: {tower: {batch: median ms}}}``; models: the teacher, each variant."""

    name = "latency"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build.latency_stage",
        "edgeglm.build.timed_towers",
        "edgeglm.engines.timing",
        "edgeglm.engines.onnxruntime_engine",
    )
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime-gpu", "numpy")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Load everything, then call each in turn."""
        variants = variants_of(inputs["quantize"].files)
        exported = inputs["export"].path
        preprocessing = read_preprocessing(exported)
        side, length = preprocessing.image.resolution, min(LENGTH, preprocessing.text.max_length)
        vocabulary = Tokenizer(exported / "tokenizer.json").vocabulary_size
        pixels = {batch: image_feeds(side, batch) for batch in BATCHES}
        words = {batch: text_feeds(vocabulary, batch, length) for batch in BATCHES}
        threads, folder = self.config.threads, inputs["quantize"].path / "models"
        calls: dict[str, dict[str, Any]] = {"image": {}, "text": {}}
        with ExitStack() as stack, context.progress.task("Latency"):
            for variant in variants:
                for tower, feeds in (("image", pixels), ("text", words)):
                    path = folder / variant / f"{tower}.onnx"
                    engine = OnnxRuntimeEngine(path, threads=threads, spinning=False)
                    calls[tower][variant] = (stack.enter_context(engine), feeds)
            image, text = opened_teacher(stack, inputs["backbones"], inputs["teacher"], threads=threads)
            calls["image"]["teacher"] = (image, {batch: image.feeds(batch) for batch in BATCHES})
            calls["text"]["teacher"] = (text, words)
            found = tower_milliseconds(calls, rounds=self.config.rounds)
        (out / "latency.json").write_text(json.dumps(found, indent=1, sort_keys=True))
        return {"latency_ms": found, "threads": threads, "tokens": length}


def latencies_of(artifact: Artifact) -> dict[str, Milliseconds]:
    """Read ``latency.json``."""
    found: dict[str, Milliseconds] = json.loads((artifact.path / "latency.json").read_text("utf-8"))
    return found
