"""What a bundle says of the files of lane A: what they were made from, and which nodes stay FP32."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgeglm.bundle.manifest import VariantRecord
from edgeglm.bundle.opened import Bundle

SUFFIX = "-lane-a"


class LaneTower(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tower.

    Attributes:
        source: The file of the bundle that it was made from.
        opset: The one operator set that it needs.
        fp32_nodes: What a builder that may choose FP16 has to keep in FP32.
        rewritten: Operator -> how many nodes were written with older ones.
        max_abs, min_cosine: Its golden outputs against those of the gated variant, in ONNX Runtime.
    """

    source: str
    opset: int
    fp32_nodes: tuple[str, ...]
    rewritten: dict[str, int]
    max_abs: float
    min_cosine: float


class LaneRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``models/<variant>/lane.json``: ``of`` is the gated variant that these files were made from."""

    lane: Literal["A"] = "A"
    of: str
    towers: dict[str, LaneTower]


def record_name(variant: str) -> str:
    """Return where the record of a variant lies in a bundle."""
    return f"models/{variant}/lane.json"


def pinned_nodes(bundle: Bundle, variant: VariantRecord) -> dict[str, tuple[str, ...]]:
    """Return ``{file: nodes}`` that a builder which may choose FP16 has to keep in FP32; lane A only."""
    name = record_name(variant.name)
    if variant.lane != "A" or name not in bundle.manifest.files:
        return {}
    towers = bundle.parsed(name, LaneRecord).towers
    return {file: towers[tower].fp32_nodes for tower, file in variant.files.items() if tower in towers}
