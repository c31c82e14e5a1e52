"""The stages that run frozen towers: pretrained backbones as ONNX, and their features of every view."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from edgeglm.adapt.backbones import Backbone, backbone_onnx, classifier_onnx, read_backbones
from edgeglm.core.durable import take_place
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.pairs import PairSet

_FEATURE_BATCH = 64
#: What teachers are made of; students have modules of their own, so that a change of one retrains no teacher.
TOWERS_CODE = (
    "edgeglm.models.efficientnet_lite",
    "edgeglm.models.hf_towers",
    "edgeglm.models.packed_text",
    "edgeglm.models.pretrained_hf",
    "edgeglm.models.projection",
    "edgeglm.models.published",
)


class BackbonesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which backbones, the side of their input in pixels (0: their own), and of a classifier's (0: none)."""

    image: tuple[str, ...]
    resolution: int
    classifier: int = 0

    @classmethod
    def of(cls, teacher: TeacherConfig) -> BackbonesConfig:
        """Return what the recipe's teacher looks through."""
        classifier = teacher.conse.resolution if teacher.conse.weight else 0
        return cls(image=teacher.image, resolution=teacher.resolution, classifier=classifier)


class BackbonesStage(Stage[BackbonesConfig]):
    """Pretrained image towers -> ``image-<i>.onnx`` and ``backbones.json``; a classifier comes last."""

    name = "backbones"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.adapt.backbones",
        *TOWERS_CODE,
        "edgeglm.export",
        "edgeglm.adapt.features_stage",
    )
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "transformers")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Export each backbone; parity with torch is asserted."""
        found: list[Backbone] = []
        config = self.config
        total = len(config.image) + bool(config.classifier)
        with context.progress.task("Teacher: backbones", total=total) as task:
            for i, name in enumerate(config.image):
                path = out / f"image-{i}.onnx"
                source = inputs[f"image-{i}"]
                found.append(backbone_onnx(name, source, path, resolution=config.resolution))
                task.advance()
            if config.classifier:
                path = out / f"image-{len(config.image)}.onnx"
                found.append(
                    classifier_onnx(
                        inputs["classifier"], path, resolution=config.classifier, beside=config.image
                    )
                )
                task.advance()
        (out / "backbones.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
        return {"parameters": sum(backbone.parameters for backbone in found)}


class FeaturesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many augmented views of each image, and the seed that makes them."""

    views: int
    seed: int


class FeaturesStage(Stage[FeaturesConfig]):
    """Features of every view of every image: ``features.npy`` float16 [1 + views, N, F]; view 0 is plain."""

    name = "features"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.adapt.features_stage",
        "edgeglm.train.views",
        "edgeglm.data.pairs",
        "edgeglm.data.transforms",
        "edgeglm.engines.onnxruntime_engine",
    )
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnxruntime-gpu", "numpy", "pillow")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Run the frozen backbones once, in ONNX Runtime."""
        import torch

        from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
        from edgeglm.train.memory import memory_advice
        from edgeglm.train.views import Views

        pairs = PairSet.open(inputs["pairs"])
        backbones = read_backbones(inputs["backbones"].path)
        views, count = 1 + self.config.views, len(pairs)
        width = sum(backbone.features for backbone in backbones)
        features = np.lib.format.open_memmap(
            out / "features.npy", mode="w+", dtype=np.float16, shape=(views, count, width)
        )
        take_place(out / "features.npy")
        with (
            memory_advice("Teacher: features", "teacher.resolution, or take a smaller teacher.image"),
            context.progress.task("Teacher: features", total=views * count * len(backbones)) as task,
        ):
            column = 0
            for backbone in backbones:
                path = inputs["backbones"].path / backbone.file
                drawn = Views(pairs, views, seed=self.config.seed, resolution=backbone.resolution)
                with OnnxRuntimeEngine(path, threads=context.threads) as engine:
                    for start in range(0, count, _FEATURE_BATCH):
                        chosen = slice(start, min(start + _FEATURE_BATCH, count))
                        for view, pixels in enumerate(drawn.every(torch.arange(chosen.start, chosen.stop))):
                            rows = engine.infer({"pixels": pixels.numpy()})["features"]
                            features[view, chosen, column : column + backbone.features] = rows
                            task.advance(len(pixels))
                column += backbone.features
        features.flush()
        widths = [backbone.features for backbone in backbones]
        return {"views": views, "images": count, "features": width, "widths": widths}


class AuxiliaryFeaturesStage(FeaturesStage):
    """Features of every view of every auxiliary image, where the recipe has any."""

    name = "auxiliary-features"
