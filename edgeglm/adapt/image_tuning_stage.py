"""The stages between frozen backbones and a teacher whose image tower was tuned on pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from edgeglm.adapt.backbones import backbone_from_module, image_module, read_backbones
from edgeglm.adapt.beginning import begun, phase_checkpoints
from edgeglm.adapt.features_stage import FeaturesStage
from edgeglm.adapt.teacher_stage import AlignmentStage, TeacherStage
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.stage import Context, Inputs
from edgeglm.core.teacher_config import AuxiliaryConfig, PretrainingConfig
from edgeglm.data.pairs import PairSet

TUNABLE = "efficientnet-lite0"


def require_tunable(config: TeacherConfig) -> None:
    """Raise UserError if the recipe tunes blocks of an image tower that has none that are known here."""
    if config.image_blocks and TUNABLE not in config.image:
        raise UserError(
            f"teacher.image_blocks tunes the last blocks of {TUNABLE}, and teacher.image is "
            f"{', '.join(config.image)}; set teacher.image_blocks to 0, or add {TUNABLE} to teacher.image"
        )


class ImageTuningStage(AlignmentStage):
    """Backbones as the backbones stage writes them, the last blocks of Lite0 tuned under heads.

    The heads learn first on the frozen features, with the recipe's ``domain`` and ``multitask`` and the text
    tower as it is; then they and the blocks learn on pictures. Only the blocks are kept.
    """

    name = "image-tuning"
    code: ClassVar[tuple[str, ...]] = (*TeacherStage.code, "edgeglm.data.transforms")
    libraries: ClassVar[tuple[str, ...]] = (*TeacherStage.libraries, "onnx", "onnxruntime-gpu")

    def __init__(self, config: TeacherConfig, *, seed: int, max_length: int) -> None:
        # The text tower is tuned by the teacher's own stage, from what comes out of this one.
        defaults = TeacherConfig()
        untuned = {
            name: getattr(defaults, name)
            for name in config.__struct_fields__
            if name.startswith("lora_") or name in ("tuning", "tuned_blocks", "tuned_rate", "virtual_tokens")
        }
        untuned |= {
            "lora_epochs": 0,
            "pretraining": PretrainingConfig(),
            "auxiliary": AuxiliaryConfig(),
            "heads": 1,
        }
        super().__init__(msgspec.structs.replace(config, **untuned), seed=seed, max_length=max_length)

    def requires(self, inputs: Inputs) -> None:
        """Check that there is a backbone that can be tuned."""
        require_tunable(self.config)

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Train, and export the tuned backbone beside the others."""
        import torch

        from edgeglm.adapt.image_tuning import TunedBlocks, front_maps
        from edgeglm.models.efficientnet_lite import SpatialLite0
        from edgeglm.train.loop import seeded
        from edgeglm.train.memory import memory_advice

        config, pairs = self.config, PairSet.open(inputs["pairs"])
        backbones = read_backbones(inputs["backbones"].path)
        place = [backbone.name for backbone in backbones].index(TUNABLE)
        ours = backbones[place]
        used: list[Path] = []
        chosen = np.sort(pairs.by_role("labelled", "unlabelled")).tolist()
        with context.store.scratch() as scratch, seeded(self.seed, threads=context.threads):
            beginning = begun(config, pairs, inputs, scratch, context.progress, max_length=self.max_length)
            alignment = beginning.alignment(
                config,
                seed=self.seed,
                checkpoints=phase_checkpoints(self.key_parts(inputs), config, context, used),
                first_state=False,
            )
            features = alignment.features_VNF
            tower, _ = image_module(TUNABLE, inputs[f"image-{place}"], ours.resolution)
            assert isinstance(tower, SpatialLite0)
            with memory_advice("Teacher: pictures", "teacher.views, or teacher.image_blocks"):
                maps = front_maps(
                    tower,
                    config.image_blocks,
                    pairs,
                    chosen,
                    scratch,
                    views=len(features),
                    seed=self.seed,
                    resolution=ours.resolution,
                    threads=context.threads,
                    progress=context.progress,
                )
                column = sum(backbone.features for backbone in backbones[:place])
                blocks = TunedBlocks(tower, config.image_blocks, features, maps, chosen, column=column)
                alignment.run()
                alignment.tune_images(blocks)
            trained = sum(parameter.numel() for parameter in blocks.parameters())
            tower.requires_grad_(False)
            tower.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            title = f"{ours.title}, {config.image_blocks} blocks tuned"
            classifier = backbones[-1] if config.conse.weight else None
            written = [
                backbone_from_module(
                    tower, out / one.file, name=one.name, title=title, resolution=one.resolution
                )
                if one is ours
                # A classifier keeps the blocks as they were, which so far counted as the backbone's.
                else msgspec.structs.replace(one, parameters=one.parameters + trained * (one is classifier))
                for one in backbones
            ]
        for one in backbones:
            if one is not ours:
                shutil.copyfile(inputs["backbones"].path / one.file, out / one.file)
        (out / "backbones.json").write_bytes(msgspec.json.format(msgspec.json.encode(written), indent=1))
        for folder in used:
            shutil.rmtree(folder, ignore_errors=True)
        return {
            "parameters": sum(one.parameters for one in written),
            "tuned": trained,
            "curves": alignment.curves,
            "pseudo_labels": alignment.pseudo_labels,
        }


class TunedFeaturesStage(FeaturesStage):
    """Features of every view of every image from the tuned backbones."""

    name = "tuned-features"
