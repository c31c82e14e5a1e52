"""Export of a model that exists already: the towers of a checkpoint as ONNX, with their tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeglm.assets import asset_named, fetch_asset
from edgeglm.bundle.atomic import disk_errors, put_in_place, require_ours, staging_folder
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress
from edgeglm.core.store import Store

if TYPE_CHECKING:
    from torch import nn


class ExportedTower(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One written tower: its file, its parameters, and its largest difference to torch."""

    tower: str
    file: str
    parameters: int
    parity_max_abs: float


def export_model(
    name: str,
    destination: Path,
    store: Store,
    progress: Progress,
    *,
    resolution: int = 0,
    max_length: int = 32,
    opset: int = 20,
) -> tuple[ExportedTower, ...]:
    """Write the towers of a pretrained model as ``image.onnx`` and ``text.onnx``, as far as it has them.

    Outputs are L2-normalised embeddings, float32 [B, D]; batch and length stay free; parity with torch
    is asserted on several shapes. ``export.json`` says what was written; a text tower comes with its
    ``tokenizer.json``.

    Args:
        name: A catalogue asset, ``hf:owner/name``, or a folder of transformers.
        destination: A folder that is absent, empty, or an earlier export.
        store: Where fetched files are kept.
        progress: Shows one step a tower.
        resolution: Side of the images in pixels; 0 for the checkpoint's own.
        max_length: The most tokens.
        opset: Of ONNX.

    Raises:
        UserError: The model is unknown or broken, or the destination holds something else.
    """
    from edgeglm.adapt.sources import source_spec

    require_ours(destination, "export.json", ("image.onnx", "text.onnx", "tokenizer.json"))
    source = fetch_asset(source_spec(name), store, progress)
    with (
        store.scratch() as scratch,
        disk_errors(destination),
        staging_folder(destination) as staging,
        progress.task(f"Exporting {name}") as task,
    ):
        folder = staging / "export"
        folder.mkdir()
        written = []
        for tower, module, inputs in _towers(name, source, scratch, folder, resolution, max_length):
            written.append(_written(tower, module, inputs, folder, opset))
            task.advance()
        record = {"model": name, "opset": opset, "towers": msgspec.to_builtins(written)}
        (folder / "export.json").write_text(json.dumps(record, indent=1))
        put_in_place(folder, destination)
    return tuple(written)


def _towers(
    name: str, source: Artifact, scratch: Path, folder: Path, resolution: int, max_length: int
) -> list[tuple[str, nn.Module, list[dict[str, Any]]]]:
    from edgeglm.adapt.backbones import image_module
    from edgeglm.adapt.text_teacher import load_text_teacher
    from edgeglm.models.pretrained_hf import is_dual_encoder, is_text_model

    packed = ":" not in name and "/" not in name and not source.path.joinpath("config.json").is_file()
    roles = set(asset_named(name).roles) if packed else set()
    dual = not packed and is_dual_encoder(source.path)
    found = []
    if dual or "image-teacher" in roles or not (packed or is_text_model(source.path)):
        module, side = image_module(name, source, resolution)
        found.append(("image", module, [_pixels(batch, side) for batch in (2, 1, 3)]))
    if dual or "text-teacher" in roles or (not packed and is_text_model(source.path)):
        text = load_text_teacher(name, source, scratch / "text", max_length=max_length)
        shutil.copyfile(text.tower.tokenizer_path, folder / "tokenizer.json")
        limit, vocabulary = text.max_length, text.tokenizer.vocabulary_size
        sizes = ((2, min(5, limit)), (1, min(3, limit)), (3, limit))
        found.append(("text", text.tower, [_tokens(*size, vocabulary) for size in sizes]))
    if not found:
        raise UserError(
            f"{name!r} is no model; name an asset with a teacher's role, hf:owner/name or a folder"
        )
    return found


def _written(
    tower: str, module: nn.Module, inputs: list[dict[str, Any]], folder: Path, opset: int
) -> ExportedTower:
    from torch import Tensor, nn

    from edgeglm.export.parity import assert_parity
    from edgeglm.export.torch_to_onnx import onnx_from_module
    from edgeglm.models.projection import normalized

    class ImageEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = module

        def forward(self, pixels: Tensor) -> Tensor:
            return normalized(self.tower(pixels))

    class TextEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = module

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return normalized(self.tower(input_ids, attention_mask))

    wrapped: nn.Module = ImageEmbedding() if tower == "image" else TextEmbedding()
    free = {0: "batch"} if tower == "image" else {0: "batch", 1: "length"}
    path = folder / f"{tower}.onnx"
    axes = dict.fromkeys(inputs[0], free)
    onnx_from_module(wrapped.eval(), inputs[0], path, dynamic_axes=axes, opset=opset)
    parity = assert_parity(wrapped, path, inputs)
    return ExportedTower(
        tower=tower,
        file=path.name,
        parameters=sum(p.numel() for p in module.parameters()),
        parity_max_abs=parity.max_abs,
    )


def _pixels(batch: int, side: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(batch)
    return {"pixels": torch.rand(batch, 3, side, side, generator=generator)}


def _tokens(batch: int, length: int, vocabulary: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
