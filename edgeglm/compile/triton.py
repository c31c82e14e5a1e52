"""A Triton model repository from a bundle: one model a tower, ONNX or this board's TensorRT plans.

Source: NVIDIA Triton Inference Server, model repository and model configuration pages
(``ModelConfig`` in model_config.proto). Triton batches requests of one shape only, so texts profit
when their clients pad to a few lengths.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.bundle.atomic import disk_errors, put_in_place, staging_folder
from edgeglm.bundle.fingerprint import fingerprint_of
from edgeglm.bundle.manifest import TensorRecord
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.receipt import ENGINE_PLAN, ENGINE_RECORD, Receipt, finalized_folder
from edgeglm.compile.contract import target_of
from edgeglm.core.errors import UserError
from edgeglm.engines.plan import plan_metadata_from_file
from edgeglm.targets.build_options import BuildOptions

ABOUT_NAME = "edgeglm.json"

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """One model of the repository: its name, its configuration and the file it serves."""

    name: str
    config: str
    source: Path
    file: str
    beside: Mapping[str, Path]


def triton_models(
    bundle: Bundle,
    *,
    variant: str | None = None,
    receipt: Receipt | None = None,
    queue_microseconds: int = 1000,
) -> tuple[TritonModel, ...]:
    """Return the models of a bundle.

    Args:
        bundle: An opened bundle.
        variant: Which variant's ONNX; the bundle's default for None. Not with a receipt.
        receipt: Serve what was chosen on this board, its plans where TensorRT built them.
        queue_microseconds: How long Triton waits for a batch to fill.

    Raises:
        UserError: an unknown variant, towers whose inputs the manifest does not say, or plans of
            TensorRT-RTX, which Triton's backend does not load.
    """
    if receipt is not None and receipt.library == "tensorrt-rtx":
        raise UserError(
            "Triton's backend loads plans of TensorRT and not of TensorRT-RTX; export the ONNX files instead"
        )
    record = bundle.variant(receipt.chosen if receipt else variant)
    plans = receipt is not None and receipt.library == "tensorrt"
    folder = finalized_folder(bundle.origin) / "engines"
    largest = max((member.engine or BuildOptions()).largest_batch for member in target_of(bundle).members)
    models = []
    for tower, name in sorted(record.files.items()):
        facts = bundle.manifest.towers[tower]
        if not facts.inputs or not facts.outputs:
            raise UserError(
                f"the manifest of {bundle.manifest.name} does not say what the {tower} tower takes; "
                "build the bundle again"
            )
        source, most = bundle.file(name), largest
        if plans:
            assert receipt is not None
            place = folder / receipt.candidate(receipt.chosen).engines[tower].signature
            source, most = place / ENGINE_PLAN, _largest_batch(place / ENGINE_RECORD)
        title = f"{re.sub(r'[^A-Za-z0-9_-]', '_', bundle.manifest.name)}_{tower}"
        models.append(
            TritonModel(
                name=title,
                config=config_text(
                    title,
                    platform="tensorrt_plan" if plans else "onnxruntime_onnx",
                    inputs=facts.inputs,
                    outputs=facts.outputs,
                    largest_batch=most,
                    queue_microseconds=queue_microseconds,
                ),
                source=source,
                file="model.plan" if plans else "model.onnx",
                beside=_beside(bundle, tower),
            )
        )
    return tuple(models)


def config_text(
    name: str,
    *,
    platform: str,
    inputs: tuple[TensorRecord, ...],
    outputs: tuple[TensorRecord, ...],
    largest_batch: int,
    queue_microseconds: int,
) -> str:
    """Return a ``config.pbtxt``; the first axis of every tensor is the batch and is left out of it."""
    lines = [f'name: "{name}"', f'platform: "{platform}"', f"max_batch_size: {largest_batch}"]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            lines += [
                f"{kind} {{",
                f'  name: "{tensor.name}"',
                f"  data_type: {_type(tensor)}",
                f"  dims: [ {', '.join(_dimensions(tensor))} ]",
                "}",
            ]
    preferred = [str(8 << power) for power in range(16) if 8 << power <= largest_batch]
    lines += [
        "dynamic_batching {",
        f"  preferred_batch_size: [ {', '.join(preferred or [str(largest_batch)])} ]",
        f"  max_queue_delay_microseconds: {queue_microseconds}",
        "}",
    ]
    return "\n".join(lines) + "\n"


def write_repository(
    bundle: Bundle, models: tuple[TritonModel, ...], destination: Path, variant: str
) -> Path:
    """Write the repository in one step. Raises UserError when the place is taken or cannot be written."""
    if destination.exists():
        raise UserError(f"{destination} is there already; choose a new folder for the model repository")
    if destination.resolve().is_relative_to(bundle.origin.resolve()):
        raise UserError(
            f"{destination} lies in the bundle, which would no longer hold what it was packed with; "
            "choose a folder outside it"
        )
    about: dict[str, Any] = {
        "bundle": bundle.manifest.name,
        "content_digest": bundle.manifest.content_digest,
        "variant": variant,
        "embedding_space": fingerprint_of(bundle.manifest, variant),
        "models": [model.name for model in models],
    }
    with disk_errors(destination), staging_folder(destination) as staging:
        root = staging / "repository"
        root.mkdir()
        for model in models:
            place = root / model.name
            (place / "1").mkdir(parents=True)
            (place / "config.pbtxt").write_text(model.config, "utf-8")
            shutil.copyfile(model.source, place / "1" / model.file)
            for name, source in model.beside.items():
                shutil.copyfile(source, place / name)
        (root / ABOUT_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(about), indent=1) + b"\n")
        put_in_place(root, destination)
    return destination


def _largest_batch(record: Path) -> int:
    """Return the most that a plan takes at once: the largest profile, by its input that takes least."""
    profiles = plan_metadata_from_file(record).profiles
    return max(min(shapes.max[0] for shapes in profile.values()) for profile in profiles)


def _beside(bundle: Bundle, tower: str) -> dict[str, Path]:
    """What a client of the tower needs to make its input."""
    beside = {"preprocessing.json": bundle.file("preprocessing.json")}
    if tower == "text":
        beside["tokenizer.json"] = bundle.tokenizer_path
    return beside


def _type(tensor: TensorRecord) -> str:
    if tensor.dtype not in _TYPES:
        raise UserError(
            f"Triton has no type for {tensor.name}, which is {tensor.dtype}; export it as float32"
        )
    return _TYPES[tensor.dtype]


def _dimensions(tensor: TensorRecord) -> list[str]:
    if len(tensor.shape) < 2 or isinstance(tensor.shape[0], int):
        raise UserError(
            f"{tensor.name} has the shape {list(tensor.shape)} with no batch in front; "
            "export it with a dynamic first axis"
        )
    return [str(size) if isinstance(size, int) else "-1" for size in tensor.shape[1:]]
