"""A calibration set for any model, from users' data; or an opened one that fits the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeglm.bundle.atomic import disk_errors, put_in_place, require_ours, staging_folder
from edgeglm.calibration.feeds import Array, Batches
from edgeglm.calibration.intake import Reading, candidates_from_data
from edgeglm.calibration.sets import (
    RECORD_NAME,
    CalibrationSet,
    calibration_set_from_arrays,
    random_calibration_set,
)
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError, unknown_name
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.protocol import TensorSpec, check_feeds
from edgeglm.export.plain import require_shapes

TOWER = "model"
_WRITTEN = (f"{TOWER}.npz", "curve.json")
Finish = Callable[[CalibrationSet], object]
_SHAPE = re.compile(r"(?P<name>.+):(?P<dims>\d+(x\d+)*)")


class Drawing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a set is drawn."""

    samples: int = 128
    batch_size: int = 8
    seed: int = 0
    reading: Reading = Reading()


def model_inputs(onnx_path: Path) -> tuple[TensorSpec, ...]:
    """Return what a model takes. Raises UserError when ONNX Runtime cannot load it, or a shape is missing."""
    import onnx

    with OnnxRuntimeEngine(onnx_path, threads=1, spinning=False) as engine:
        if any(not spec.shape for spec in engine.inputs):  # which of the two it is, ONNX Runtime does not say
            require_shapes(onnx.load(onnx_path, load_external_data=False), onnx_path.name)
        return engine.inputs


def calibration_set_for_model(
    data: Path,
    onnx_path: Path,
    out: Path,
    *,
    drawing: Drawing,
    tokenizer: Path | None = None,
    evaluation: Path | None = None,
    finish: Finish | None = None,
) -> CalibrationSet:
    """Draw samples for a model and write the set to ``out``; an earlier set there is replaced as a whole.

    ``finish`` is given the set before it is put in place, to write files beside it, and may raise. The other
    arguments are those of ``intake.candidates_from_data``.

    Raises:
        UserError: The data do not fit the model, hold too little, or overlap with ``evaluation``; or ``out``
            holds something else than a set.
    """
    given = [path for path in (data, onnx_path, tokenizer, evaluation) if path is not None]
    require_ours(out, RECORD_NAME, _WRITTEN, inputs=given)
    inputs = model_inputs(onnx_path)
    candidates = candidates_from_data(
        data, inputs, reading=drawing.reading, tokenizer=tokenizer, evaluation=evaluation
    )
    with disk_errors(out), staging_folder(out) as staged:
        new = staged / "new"
        made = calibration_set_from_arrays(
            new,
            {TOWER: candidates},
            preprocessing=_preprocessing(drawing.reading, tokenizer),
            samples=drawing.samples,
            batch_size=drawing.batch_size,
            seed=drawing.seed,
        )
        _require_batch(inputs, drawing.batch_size, made.batches(TOWER).samples)
        check_feeds(inputs, made.batches(TOWER)[0], onnx_path.name)
        if finish is not None:
            finish(made)
        put_in_place(new, out)
    return CalibrationSet(folder=out, record=made.record)


def _preprocessing(reading: Reading, tokenizer: Path | None) -> dict[str, Any]:
    """Return what decides the tensors beside the data."""
    made: dict[str, Any] = msgspec.to_builtins(reading)
    return made if tokenizer is None else {**made, "tokenizer_sha256": sha256_file(tokenizer)}


def random_set_for_model(
    onnx_path: Path,
    out: Path,
    *,
    drawing: Drawing,
    shapes: Sequence[str],
    allow_random: bool,
    finish: Finish | None = None,
) -> CalibrationSet:
    """Write noise for a model, which the record then says. Needs ``allow_random``, and every dimension.

    ``shapes`` are ``name:1x3x224x224`` for inputs whose dimensions the model leaves open; the first of
    each is replaced by the number of samples. ``out`` and ``finish`` are as in
    :func:`calibration_set_for_model`.

    Raises UserError for a shape that the model does not take, or of no input.
    """
    require_ours(out, RECORD_NAME, _WRITTEN, inputs=[onnx_path])
    inputs, given = model_inputs(onnx_path), _parsed(shapes)
    for name in given:
        if name not in {spec.name for spec in inputs}:
            raise unknown_name("input", name, [spec.name for spec in inputs])
    tensors = {spec.name: _noise(spec, given.get(spec.name), drawing) for spec in inputs}
    _require_batch(inputs, drawing.batch_size, drawing.samples)
    check_feeds(
        inputs, {name: noise[: drawing.batch_size] for name, noise in tensors.items()}, onnx_path.name
    )
    with disk_errors(out), staging_folder(out) as staged:
        new = staged / "new"
        made = random_calibration_set(
            new,
            {TOWER: tensors},
            preprocessing={},
            allow_random=allow_random,
            batch_size=drawing.batch_size,
            seed=drawing.seed,
        )
        if finish is not None:
            finish(made)
        put_in_place(new, out)
    return CalibrationSet(folder=out, record=made.record)


def is_calibration_set(data: Path) -> bool:
    """Whether a folder holds a drawn set."""
    return (data / RECORD_NAME).is_file()


def tower_for_model(found: CalibrationSet, onnx_path: Path) -> str:
    """Return the set's part whose names are the model's inputs. Raises UserError."""
    names = {spec.name for spec in model_inputs(onnx_path)}
    for tower, part in found.record.towers.items():
        if set(part.tensors) == names:
            return tower
    parts = "; ".join(f"{tower}: {', '.join(part.tensors)}" for tower, part in found.record.towers.items())
    raise UserError(
        f"{onnx_path.name} takes {', '.join(sorted(names))}, and the set holds {parts}; "
        "draw one for this model with edgeglm calibrate"
    )


def batches_for_model(found: CalibrationSet, onnx_path: Path) -> Batches:
    """Return the samples of that part. Raises UserError."""
    return found.batches(tower_for_model(found, onnx_path))


def _require_batch(inputs: Sequence[TensorSpec], batch_size: int, samples: int) -> None:
    """Raise UserError for batches that a model of a fixed batch size cannot take."""
    fixed = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
    for size in sorted(fixed):
        if batch_size != size:
            raise UserError(f"the model takes batches of {size}, not {batch_size}; give --batch-size {size}")
        if samples % size:
            raise UserError(
                f"{samples} samples do not fill batches of {size}, which the model takes; "
                f"give --samples {max(size, samples - samples % size)}"
            )


def _parsed(shapes: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    found = {}
    for text in shapes:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise UserError(f"cannot read the shape {text!r}; write it as name:1x3x224x224")
        found[match["name"]] = tuple(int(size) for size in match["dims"].split("x"))
    return found


def _noise(spec: TensorSpec, shape: tuple[int, ...] | None, drawing: Drawing) -> Array:
    dims = shape if shape is not None else spec.shape
    rest = []
    for size in dims[1:]:
        if not isinstance(size, int):
            raise UserError(f"{spec} leaves a dimension open; give --shape {spec.name}:1x...")
        rest.append(size)
    random = np.random.default_rng(drawing.seed)
    full = (drawing.samples, *rest)
    if spec.dtype.startswith("float"):
        return random.standard_normal(full, dtype=np.float32).astype(spec.dtype)
    if spec.name.endswith("mask"):
        return np.ones(full, spec.dtype)
    return random.integers(0, 100, full).astype(spec.dtype)  # token ids that any vocabulary has
