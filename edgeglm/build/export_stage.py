"""The export stage: both student towers as ONNX, each held against torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from edgeglm.bundle.preprocessing import Preprocessing
from edgeglm.core.recipe import ExportConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.data.tokenization import TextPreprocessing, teacher_tokenizer
from edgeglm.data.transforms import ImagePreprocessing

if TYPE_CHECKING:
    from edgeglm.models.students import ImageTower, StudentTextTower


class ExportStageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the ONNX files besides the weights."""

    export: ExportConfig
    size: str
    resolution: int
    margin: float


class ExportStage(Stage[ExportStageConfig]):
    """``models/fp32/{image,text}.onnx``, ``tokenizer.json``, ``preprocessing.json``, ``towers.json``."""

    name = "export"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build.export_stage",
        "edgeglm.export",
        "edgeglm.models.students",
        "edgeglm.models.student_shapes",
        "edgeglm.models.efficientnet_lite",
        "edgeglm.models.projection",
    )
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime-gpu")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Export with free batch and length; parity on three shapes is asserted."""
        image, text = load_students(inputs, self.config.size, self.config.resolution)
        limit, side = len(text.places), self.config.resolution
        with context.progress.task("Export", total=None):
            parity = exported_towers(image, text, side, out / "models" / "fp32", self.config.export)
        _, settings = teacher_tokenizer(inputs["teacher"].path)
        preprocessing = Preprocessing(
            image=ImagePreprocessing(resolution=side, margin=self.config.margin),
            text=TextPreprocessing(max_length=limit, lowercase=settings.lowercase),
        )
        encoded = msgspec.json.format(msgspec.json.encode(preprocessing), indent=1)
        (out / "preprocessing.json").write_bytes(encoded)
        shutil.copyfile(inputs["distil-text"].path / "tokenizer.json", out / "tokenizer.json")
        towers = {
            name: {"parameters": sum(p.numel() for p in tower.parameters())}
            for name, tower in (("image", image), ("text", text))
        }
        towers["image"]["embedding_dim"] = towers["text"]["embedding_dim"] = image.project.out_features
        (out / "towers.json").write_text(json.dumps(towers, sort_keys=True))
        return {"parity": parity, "towers": towers}


def exported_towers(
    image: ImageTower, text: StudentTextTower, side: int, folder: Path, config: ExportConfig
) -> dict[str, float]:
    """Write ``image.onnx`` and ``text.onnx`` into a folder; return how far each is from torch at the most."""
    return {
        "image": exported_image(image, side, folder, config),
        "text": exported_text(text, folder, config),
    }


def exported_image(tower: ImageTower, side: int, folder: Path, config: ExportConfig) -> float:
    """Write ``image.onnx`` into a folder; return how far it is from torch at the most."""
    import torch

    from edgeglm.export.parity import assert_parity
    from edgeglm.export.torch_to_onnx import onnx_from_module

    generator = torch.Generator().manual_seed(0)

    def pixels(batch: int) -> dict[str, torch.Tensor]:
        return {"pixels": torch.rand(batch, 3, side, side, generator=generator)}

    path = folder / "image.onnx"
    onnx_from_module(tower, pixels(2), path, dynamic_axes={"pixels": {0: "batch"}}, opset=config.opset)
    shapes = [pixels(1), pixels(3), pixels(8)]
    return assert_parity(tower, path, shapes, atol=config.parity_atol).max_abs


def exported_text(tower: StudentTextTower, folder: Path, config: ExportConfig) -> float:
    """Write ``text.onnx`` into a folder; return how far it is from torch at the most."""
    import torch

    from edgeglm.export.parity import assert_parity
    from edgeglm.export.torch_to_onnx import onnx_from_module

    generator = torch.Generator().manual_seed(0)
    vocabulary, limit = tower.tokens.num_embeddings, len(tower.places)

    def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        mask[0, 0] = 1
        return {"input_ids": ids, "attention_mask": mask}

    path, free = folder / "text.onnx", {0: "batch", 1: "length"}
    axes = {"input_ids": free, "attention_mask": free}
    onnx_from_module(tower, tokens(2, min(5, limit)), path, dynamic_axes=axes, opset=config.opset)
    shapes = [tokens(1, 3), tokens(3, min(7, limit)), tokens(8, limit)]
    return assert_parity(tower, path, shapes, atol=config.parity_atol).max_abs


def load_students(inputs: Inputs, size: str, resolution: int) -> tuple[ImageTower, StudentTextTower]:
    """Load both students from the artifacts ``distil-image`` and ``distil-text``, in eval mode."""
    from safetensors.torch import load_file

    from edgeglm.models.student_shapes import student_shape
    from edgeglm.models.students import StudentTextTower, student_image_tower

    shape = student_shape(size)
    image_folder, text_folder = inputs["distil-image"].path, inputs["distil-text"].path
    of_image, of_text = _shape(image_folder / "image.json"), _shape(text_folder / "text.json")
    image = student_image_tower(shape, resolution=resolution, embedding_dim=of_image["embedding_dim"])
    text = StudentTextTower(
        shape,
        vocabulary=of_text["vocabulary"],
        max_length=of_text["max_length"],
        embedding_dim=of_text["embedding_dim"],
    )
    image.load_state_dict(load_file(image_folder / "image.safetensors"))
    text.load_state_dict(load_file(text_folder / "text.safetensors"))
    return image.eval(), text.eval()


def _shape(path: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(path.read_text("utf-8"))
    return found
