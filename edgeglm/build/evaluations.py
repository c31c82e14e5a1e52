"""Evaluations as stages of their own: the metrics of a teacher, of a student in torch, of ONNX files.

Each leaves ``metrics.json``: ``{track: TrackMetrics}``; ``precisions.json``: AP@10 of each query by track,
so that ratios have paired intervals; and ``latency.json``: what its own towers took at that moment. That they
are apart from training means that a new metric costs no training, and that a training stage's key does not
hang on how it is judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.build.export_stage import load_students
from edgeglm.build.pools import Ratios, ratios_of
from edgeglm.build.timed_towers import (
    BATCHES,
    LENGTH,
    Milliseconds,
    image_feeds,
    opened_teacher,
    text_feeds,
    tower_milliseconds,
)
from edgeglm.bundle.preprocessing import Preprocessing
from edgeglm.core.artifact import Artifact
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer, teacher_tokenizer
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.retrieval import FloatArray, TrackMetrics, evaluate_tracks
from edgeglm.evaluate.towers import TextSettings, gallery_images, text_embeddings, towers_on_tracks

Metrics = dict[str, TrackMetrics]
#: AP@10 of each query, float64 [Q], by track.
Precisions = dict[str, npt.NDArray[np.float64]]

_CODE = (
    "edgeglm.build.evaluations",
    "edgeglm.build.timed_towers",
    "edgeglm.engines.timing",
    "edgeglm.evaluate.retrieval",
    "edgeglm.evaluate.towers",
    "edgeglm.data.transforms",
    "edgeglm.data.tokenization",
)
_LIBRARIES = ("onnxruntime-gpu", "numpy", "pillow", "tokenizers")


class EvaluationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seed of the bootstrap; size and resolution of a student that is still in torch."""

    seed: int
    size: str = ""
    resolution: int = 0


def metrics_of(artifact: Artifact) -> Metrics:
    """Read the metrics that an evaluation left."""
    return msgspec.json.decode((artifact.path / "metrics.json").read_bytes(), type=Metrics)


def milliseconds_of(artifact: Artifact) -> Milliseconds:
    """Read what the towers took when they were evaluated, one thread."""
    found: Milliseconds = json.loads((artifact.path / "latency.json").read_text("utf-8"))
    return found


def precisions_of(artifact: Artifact) -> Precisions:
    """Read AP@10 of each query by track."""
    rows = json.loads((artifact.path / "precisions.json").read_text("utf-8"))
    return {track: np.asarray(values, np.float64) for track, values in rows.items()}


def student_ratios(inputs: Inputs, pairs: PairSet) -> Ratios:
    """Return student / teacher of the artifacts ``export-evaluation`` and ``teacher-evaluation``."""
    student, teacher = (precisions_of(inputs[f"{side}-evaluation"]) for side in ("export", "teacher"))
    return ratios_of(student, teacher, pairs.tracks)


class TeacherEvaluation(Stage[EvaluationConfig]):
    """The teacher's own retrieval."""

    name = "teacher-evaluation"
    code: ClassVar[tuple[str, ...]] = _CODE
    libraries: ClassVar[tuple[str, ...]] = _LIBRARIES

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Rank with the cached image embeddings and the exported text tower."""
        pairs, folder = PairSet.open(inputs["pairs"]), inputs["teacher"].path
        tokenizer, settings = teacher_tokenizer(folder)
        text = TextSettings(tokenizer=tokenizer, max_length=settings.max_length)
        precisions: Precisions = {}
        with context.progress.task("Evaluating the teacher"):
            metrics = evaluate_tracks(
                pairs.tracks,
                lambda texts: text_embeddings(folder / "text.onnx", texts, text, threads=context.threads),
                np.load(folder / "image_embeddings.npy", mmap_mode="r")[0],
                seed=self.config.seed,
                precisions=precisions,
            )
        words = _words(tokenizer, settings.max_length)
        with ExitStack() as stack:
            image, tower = opened_teacher(stack, inputs["backbones"], inputs["teacher"], threads=1)
            pixels = {batch: image.feeds(batch) for batch in BATCHES}
            latency = _milliseconds(image, pixels, tower, words)
        return _written(metrics, precisions, latency, out)


class StudentEvaluation(Stage[EvaluationConfig]):
    """The distilled student in torch, before export."""

    name = "distil-evaluation"
    code: ClassVar[tuple[str, ...]] = (
        *_CODE,
        "edgeglm.models.students",
        "edgeglm.models.student_shapes",
        "edgeglm.models.efficientnet_lite",
    )
    libraries: ClassVar[tuple[str, ...]] = (*_LIBRARIES, "torch")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Embed galleries and queries with both towers."""
        import torch

        from edgeglm.train.loop import seeded

        pairs = PairSet.open(inputs["pairs"])
        _, settings = teacher_tokenizer(inputs["teacher"].path)
        tokenizer = Tokenizer(inputs["distil-text"].path / "tokenizer.json", lowercase=settings.lowercase)
        image, text = load_students(inputs, self.config.size, self.config.resolution)
        chosen = gallery_images(pairs.tracks)
        precisions: Precisions = {}

        def embedded(texts: list[str]) -> FloatArray:
            rows = []
            for start in range(0, len(texts), 64):
                ids, mask = tokenizer.encode(texts[start : start + 64], max_length=len(text.places))
                rows.append(text(torch.from_numpy(ids), torch.from_numpy(mask)).numpy())
            return np.concatenate(rows)

        progress = context.progress
        with progress.task("Evaluating the student"), seeded(0, threads=context.threads), torch.no_grad():
            parts = []
            for start in range(0, len(chosen), 128):
                inputs_B = pairs.shown(chosen[start : start + 128], self.config.resolution)
                parts.append(image(torch.from_numpy(inputs_B)).numpy())
            rows = np.zeros((len(pairs), parts[0].shape[1]), np.float32)
            rows[chosen] = np.concatenate(parts)
            metrics = evaluate_tracks(
                pairs.tracks, embedded, rows, seed=self.config.seed, precisions=precisions
            )
        with seeded(0, threads=1), torch.no_grad():
            latency = _milliseconds(
                _TorchTower(image), _pixels(self.config.resolution),
                _TorchTower(text), _words(tokenizer, len(text.places)),
            )  # fmt: skip
        return _written(metrics, precisions, latency, out)


class ExportEvaluation(Stage[EvaluationConfig]):
    """The exported FP32 files in ONNX Runtime."""

    name = "export-evaluation"
    code: ClassVar[tuple[str, ...]] = _CODE
    libraries: ClassVar[tuple[str, ...]] = _LIBRARIES

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Evaluate the very files."""
        pairs, folder = PairSet.open(inputs["pairs"]), inputs["export"].path
        towers = {tower: folder / "models" / "fp32" / f"{tower}.onnx" for tower in ("image", "text")}
        precisions: Precisions = {}
        with context.progress.task("Evaluating the ONNX files"):
            metrics, _ = exported_on_tracks(
                towers, pairs, folder, context.threads, self.config.seed, precisions
            )
        preprocessing = read_preprocessing(folder)
        words = _words(Tokenizer(folder / "tokenizer.json"), preprocessing.text.max_length)
        with ExitStack() as stack:
            image, text = (
                stack.enter_context(OnnxRuntimeEngine(towers[tower], threads=1, spinning=False))
                for tower in ("image", "text")
            )
            latency = _milliseconds(image, _pixels(preprocessing.image.resolution), text, words)
        return _written(metrics, precisions, latency, out)


class _TorchTower:
    """A module as an engine: feeds by the names of its arguments."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def infer(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the module on arrays."""
        import torch

        return {"embedding": self.module(*(torch.from_numpy(array) for array in feeds.values())).numpy()}


def _pixels(resolution: int) -> dict[int, Any]:
    return {batch: image_feeds(resolution, batch) for batch in BATCHES}


def _words(tokenizer: Tokenizer, max_length: int) -> dict[int, Any]:
    length = min(LENGTH, max_length)
    return {batch: text_feeds(tokenizer.vocabulary_size, batch, length) for batch in BATCHES}


def _milliseconds(image: Any, pixels: Mapping[int, Any], text: Any, words: Mapping[int, Any]) -> Milliseconds:
    return tower_milliseconds({"image": {"": (image, pixels)}, "text": {"": (text, words)}})[""]


def exported_on_tracks(
    towers: Mapping[str, Path],
    pairs: PairSet,
    exported: Path,
    threads: int,
    seed: int,
    precisions: Precisions | None = None,
) -> tuple[Metrics, FloatArray]:
    """Evaluate ONNX files with the preprocessing and tokenizer of an export artifact.

    ``precisions`` is filled with AP@10 of each query by track. Returns the metrics and the embeddings
    float32 [N, D] of all images, zero outside the galleries.
    """
    preprocessing = read_preprocessing(exported)
    tokenizer = Tokenizer(exported / "tokenizer.json", lowercase=preprocessing.text.lowercase)
    return towers_on_tracks(
        towers,
        pairs.tracks,
        pairs.images,
        preprocessing=preprocessing.image,
        text=TextSettings(tokenizer=tokenizer, max_length=preprocessing.text.max_length),
        threads=threads,
        seed=seed,
        precisions=precisions,
    )


def read_preprocessing(exported: Path) -> Preprocessing:
    """Read the preprocessing that an export artifact fixes."""
    return msgspec.json.decode((exported / "preprocessing.json").read_bytes(), type=Preprocessing)


def _written(metrics: Metrics, precisions: Precisions, latency: Milliseconds, out: Path) -> dict[str, Any]:
    (out / "metrics.json").write_bytes(msgspec.json.format(msgspec.json.encode(metrics), indent=1))
    by_track = {track: values.tolist() for track, values in precisions.items()}
    (out / "precisions.json").write_text(json.dumps(by_track))
    (out / "latency.json").write_text(json.dumps(latency, indent=1, sort_keys=True))
    return {"metrics": msgspec.to_builtins(metrics), "latency_ms": latency}
