"""The stages that make a teacher: its frozen backbones, their features, and the alignment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from edgeglm.adapt.backbones import CLASSIFIED_BY, Backbone, backbone_onnx, classifier_onnx, read_backbones
from edgeglm.adapt.beginning import IMAGE_OPTIONS, begun, phase_checkpoints
from edgeglm.adapt.conse import CLASS_NAMES
from edgeglm.core.artifact import Artifact
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.core.store import Store
from edgeglm.core.teacher_config import PretrainingConfig
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import TextPreprocessing

_FEATURE_BATCH = 64


def source_spec(name: str) -> str:
    """Return what ``fetch_asset`` takes for a model named in a recipe: a bare folder becomes ``file:``."""
    return f"file:{name}" if ":" not in name and ("/" in name or name.startswith(".")) else name


def teacher_inputs(config: TeacherConfig, store: Store, progress: Progress) -> dict[str, Artifact]:
    """Fetch the pretrained towers: ``image-0``, ``image-1``, ..., ``text``, and what ``conse`` needs."""
    from edgeglm.assets import fetch_asset

    return {name: fetch_asset(spec, store, progress) for name, spec in teacher_assets(config).items()}


def teacher_assets(config: TeacherConfig) -> dict[str, str]:
    """Return what ``teacher_inputs`` fetches, by the name of the input."""
    found = {f"image-{i}": source_spec(name) for i, name in enumerate(config.image)}
    if config.conse.weight:
        found |= {"classifier": CLASSIFIED_BY, "class-names": CLASS_NAMES}
    return {**found, "text": source_spec(config.text)}


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
        "edgeglm.adapt.stages",
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
        "edgeglm.adapt.stages",
        "edgeglm.train.views",
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


class AlignmentStage(Stage[TeacherConfig]):
    """What a stage that aligns is known by, whether heads or blocks of a tower come out of it."""

    def __init__(self, config: TeacherConfig, *, seed: int, max_length: int) -> None:
        super().__init__(config)
        self.seed, self.max_length = seed, max_length

    def key_parts(self, inputs: Inputs) -> dict[str, Any]:
        """Add what is no part of the teacher's own table; how often a state is kept decides nothing."""
        parts = {**super().key_parts(inputs), "seed": self.seed, "max_length": self.max_length}
        del parts["config"]["optimisation"]["checkpoint_epochs"]
        return parts


class TeacherStage(AlignmentStage):
    """Aligned teacher.

    ``image-head.onnx`` (features -> embedding), ``text.onnx``, ``tokenizer.json``, ``text.json`` (how texts
    are tokenised), ``image_embeddings.npy`` float32 [1 + views, N, D], ``teacher.json``. Where it learned to
    classify, ``kinds.onnx`` too: features -> logits [B, C] of the classes in ``teacher.json``, in order.
    """

    name = "teacher"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.adapt",
        "edgeglm.train",
        "edgeglm.models.conse",
        "edgeglm.models.joined_heads",
        *TOWERS_CODE,
        "edgeglm.export",
        "edgeglm.data.auxiliary",
        "edgeglm.data.tokenization",
        "edgeglm.data.unseen_names",
        "edgeglm.data.vocabulary",
    )
    libraries: ClassVar[tuple[str, ...]] = ("torch", "peft", "transformers", "onnxscript", "tokenizers")

    def __init__(self, config: TeacherConfig, *, seed: int, max_length: int) -> None:
        # What was read, and what tuned the backbones, comes with the inputs.
        elsewhere = {name: getattr(TeacherConfig(), name) for name in IMAGE_OPTIONS}
        own = msgspec.structs.replace(config, pretraining=PretrainingConfig(), **elsewhere)
        super().__init__(own, seed=seed, max_length=max_length)

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Align, then export the heads and the merged text tower; parity is asserted."""
        from edgeglm.adapt.alignment import embedded_views
        from edgeglm.adapt.further_heads import further_alignments, joined_heads
        from edgeglm.models.conse import learned_head
        from edgeglm.models.projection import ScaledHeads
        from edgeglm.train.loop import seeded
        from edgeglm.train.memory import memory_advice

        config, pairs, parts = self.config, PairSet.open(inputs["pairs"]), self.key_parts(inputs)
        used: list[Path] = []
        with (
            context.store.scratch() as scratch,
            seeded(self.seed, threads=context.threads),
            memory_advice("Teacher", "teacher.views, data.concepts, or take a smaller teacher.text"),
        ):
            beginning = begun(config, pairs, inputs, scratch, context.progress, max_length=self.max_length)
            alignment = beginning.alignment(
                config, seed=self.seed, checkpoints=phase_checkpoints(parts, config, context, used)
            )
            alignment.run()
            text, curves = alignment.text, dict(alignment.curves)
            heads: tuple[Any, Any] = (alignment.image_head, alignment.text_head)
            if config.heads > 1:
                members = [heads]
                for other in further_alignments(beginning, config, parts, context, used, seed=self.seed):
                    members.append((other.image_head, other.text_head))
                    curves |= {f"heads {len(members)}: {phase}": c for phase, c in other.curves.items()}
                heads = joined_heads(members, alignment)
            image_head, text_head = heads
            np.save(out / "image_embeddings.npy", embedded_views(image_head, alignment.features_VNF))
            parity = _export(alignment, image_head, text_head, out)
            shutil.copyfile(text.tower.tokenizer_path, out / "tokenizer.json")
        settings = TextPreprocessing(max_length=text.max_length, lowercase=text.lowercase)
        (out / "text.json").write_bytes(msgspec.json.encode(settings))
        counts = {
            "image_head": _parameters(image_head),
            "text": text.parameters() + _parameters(text_head),
            "lora": alignment.trainable,
        }
        record: dict[str, Any] = {"parameters": counts, "curves": curves, "parity": parity}
        record["margin"] = pairs.margin
        if alignment.pseudo_labels:
            record["pseudo_labels"] = alignment.pseudo_labels
        if isinstance(learned := learned_head(alignment.image_head), ScaledHeads):
            found = learned.scales.detach().tolist()
            record["scales"] = dict(zip(config.image, found, strict=True))
        if alignment.named is not None:
            record["named_classes"] = len(alignment.named.place)
        if alignment.multitask is not None:
            held = sorted({i for track in pairs.tracks for i in track.gallery} & pairs.evaluation_images())
            record["classes"] = {one.name: one.classes for one in alignment.multitask.kinds}
            record["classification"] = alignment.multitask.scores(alignment.features_VNF[0], pairs, held)
        (out / "teacher.json").write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        for folder in used:
            shutil.rmtree(folder, ignore_errors=True)
        return {**record, "lora_merge_difference": alignment.merge_difference}


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _export(alignment: Any, image_head: Any, text_head: Any, out: Path) -> dict[str, float]:
    """Write both ONNX files; return the largest differences to torch."""
    import torch
    from torch import Tensor, nn

    from edgeglm.export.parity import assert_parity
    from edgeglm.export.torch_to_onnx import onnx_from_module

    class AlignedText(nn.Module):
        def __init__(self, tower: nn.Module, head: nn.Module) -> None:
            super().__init__()
            self.tower, self.head = tower, head

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            embedded: Tensor = self.head(self.tower(input_ids, attention_mask))
            return embedded

    class ImageHead(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, features: Tensor) -> Tensor:
            embedded: Tensor = self.head(features)
            return embedded

    text, texts = alignment.text, list(alignment.concepts.texts[:8])
    encoded = text.tokenizer.encode(texts, max_length=text.max_length)
    ids, mask = (torch.from_numpy(array) for array in encoded)
    batches = [{"input_ids": ids, "attention_mask": mask}]
    batches.append({"input_ids": ids[:1, :3], "attention_mask": mask[:1, :3]})
    free = {0: "batch", 1: "length"}
    module = AlignedText(text.module(), text_head).eval()
    if ids.shape[0] < 2 or ids.shape[1] < 2:  # the exporter would take a 1 for a constant
        batches[0] = {name: tensor.repeat(2, 2) for name, tensor in batches[0].items()}
    onnx_from_module(
        module, batches[0], out / "text.onnx", dynamic_axes={"input_ids": free, "attention_mask": free}
    )
    text_parity = assert_parity(module, out / "text.onnx", batches)

    rows = alignment.features_VNF[0][:8].float()
    head = ImageHead(image_head).eval()
    example = {"features": rows.repeat(2, 1)[:8]}
    onnx_from_module(head, example, out / "image-head.onnx", dynamic_axes={"features": {0: "batch"}})
    image_parity = assert_parity(head, out / "image-head.onnx", [example, {"features": rows[:1]}])
    differences = {"text": text_parity.max_abs, "image": image_parity.max_abs}
    if alignment.multitask is None:
        return differences

    class Kinds(nn.Module):
        def __init__(self, tasks: Any) -> None:
            super().__init__()
            self.head = tasks.image_head if tasks.own_head is None else tasks.own_head
            self.classifiers, self.scale = tasks.classifiers, tasks.scale

        def forward(self, features: Tensor) -> Tensor:
            embedded = self.head(features) * self.scale
            return torch.cat([classifier(embedded) for classifier in self.classifiers], dim=1)

    kinds = Kinds(alignment.multitask).eval()
    onnx_from_module(
        kinds,
        example,
        out / "kinds.onnx",
        output_names=("logits",),
        dynamic_axes={"features": {0: "batch"}},
    )
    kinds_parity = assert_parity(kinds, out / "kinds.onnx", [example, {"features": rows[:1]}], atol=1e-3)
    return {**differences, "kinds": kinds_parity.max_abs}
