"""The stage that aligns a teacher on cached features."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from edgeglm.adapt.beginning import IMAGE_OPTIONS, begun, phase_checkpoints
from edgeglm.adapt.features_stage import TOWERS_CODE
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.core.teacher_config import PretrainingConfig
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import TextPreprocessing


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
        from edgeglm.adapt.teacher_export import exported_teacher
        from edgeglm.adapt.text_teacher import read_in_part
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
            captions = read_in_part(beginning.text, pairs.training_texts())
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
            parity = exported_teacher(alignment, image_head, text_head, out)
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
        record["captions"] = captions
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
