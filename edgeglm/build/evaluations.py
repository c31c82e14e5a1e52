"""Evaluations as stages of their own: the metrics of a teacher, of a student in torch, of ONNX files.

Each leaves ``metrics.json``: ``{track: TrackMetrics}``. That they are apart from training means that a new
metric costs no training, and that a training stage's key does not hang on how it is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from edgeglm.build.export_stage import load_students
from edgeglm.bundle.preprocessing import Preprocessing
from edgeglm.core.artifact import Artifact
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer, teacher_tokenizer
from edgeglm.data.transforms import model_input_from_pixels
from edgeglm.evaluate.retrieval import FloatArray, TrackMetrics, evaluate_tracks
from edgeglm.evaluate.towers import TextSettings, gallery_images, text_embeddings, towers_on_tracks

Metrics = dict[str, TrackMetrics]

_CODE = (
    "edgeglm.build.evaluations",
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
        with context.progress.task("Evaluating the teacher"):
            metrics = evaluate_tracks(
                pairs.tracks,
                lambda texts: text_embeddings(folder / "text.onnx", texts, text, threads=context.threads),
                np.load(folder / "image_embeddings.npy", mmap_mode="r")[0],
                seed=self.config.seed,
            )
        return _written(metrics, out)


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
                pixels = np.asarray(pairs.images[chosen[start : start + 128]])
                inputs_B = model_input_from_pixels(pixels, self.config.resolution)
                parts.append(image(torch.from_numpy(inputs_B)).numpy())
            rows = np.zeros((len(pairs), parts[0].shape[1]), np.float32)
            rows[chosen] = np.concatenate(parts)
            metrics = evaluate_tracks(pairs.tracks, embedded, rows, seed=self.config.seed)
        return _written(metrics, out)


class ExportEvaluation(Stage[EvaluationConfig]):
    """The exported FP32 files in ONNX Runtime."""

    name = "export-evaluation"
    code: ClassVar[tuple[str, ...]] = _CODE
    libraries: ClassVar[tuple[str, ...]] = _LIBRARIES

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Evaluate the very files."""
        pairs, folder = PairSet.open(inputs["pairs"]), inputs["export"].path
        towers = {tower: folder / "models" / "fp32" / f"{tower}.onnx" for tower in ("image", "text")}
        with context.progress.task("Evaluating the ONNX files"):
            metrics, _ = exported_on_tracks(towers, pairs, folder, context.threads, self.config.seed)
        return _written(metrics, out)


def exported_on_tracks(
    towers: Mapping[str, Path], pairs: PairSet, exported: Path, threads: int, seed: int
) -> tuple[Metrics, FloatArray]:
    """Evaluate ONNX files with the preprocessing and tokenizer of an export artifact.

    Returns the metrics and the embeddings float32 [N, D] of all images, zero outside the galleries.
    """
    preprocessing = read_preprocessing(exported)
    tokenizer = Tokenizer(exported / "tokenizer.json", lowercase=preprocessing.text.lowercase)
    return towers_on_tracks(
        towers,
        pairs.tracks,
        pairs.images,
        resolution=preprocessing.image.resolution,
        text=TextSettings(tokenizer=tokenizer, max_length=preprocessing.text.max_length),
        threads=threads,
        seed=seed,
    )


def read_preprocessing(exported: Path) -> Preprocessing:
    """Read the preprocessing that an export artifact fixes."""
    return msgspec.json.decode((exported / "preprocessing.json").read_bytes(), type=Preprocessing)


def _written(metrics: Metrics, out: Path) -> dict[str, Any]:
    (out / "metrics.json").write_bytes(msgspec.json.format(msgspec.json.encode(metrics), indent=1))
    return {"metrics": msgspec.to_builtins(metrics)}
