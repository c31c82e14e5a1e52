"""The record beside a plan. The plan stays raw, so that any other tool can load it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgeglm.core.errors import UserError

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Shape = tuple[int, ...]


class ShapeRange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shapes that one optimization profile covers for one input."""

    min: Shape
    opt: Shape
    max: Shape


class TensorRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input or output of a plan; -1 marks a dynamic dimension, as in TensorRT."""

    name: str
    dtype: str
    shape: Shape


class PlanMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a plan was made from, by what, and where it can run.

    Attributes:
        sms: Compute capabilities without the dot that the plan holds code for.
        library_version: The exact version; a plan loads in no other unless it says so.
        buckets: Shapes that get an execution context of their own in a profile that covers more; a profile
            that is a single shape is a bucket without being named here.
        onnx_sha256: The digest of the ONNX file. Plans are not reproducible bit by bit, ONNX is.
        profiles: One item an optimization profile: ``{input name: shapes}``.
        precision: The precision of the matrix products in the ONNX graph.
        seconds: Time of the build.
    """

    schema: Literal[1] = 1
    library: Literal["tensorrt", "tensorrt-rtx"]
    library_version: str
    sms: tuple[int, ...]
    onnx_sha256: Sha256
    plan_sha256: Sha256
    size_bytes: int
    profiles: tuple[dict[str, ShapeRange], ...]
    buckets: tuple[dict[str, Shape], ...] = ()
    precision: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    options: dict[str, bool] = {}
    variant: str = ""
    tower: str = ""
    seconds: float = 0.0


def plan_metadata_from_file(path: Path) -> PlanMetadata:
    """Read the JSON beside a plan. Raises UserError when it is absent or broken."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=PlanMetadata)
    except (OSError, msgspec.DecodeError) as error:  # a ValidationError is a DecodeError
        raise UserError(f"cannot read the engine record {path}: {error}; build the engine again") from error
