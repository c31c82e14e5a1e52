"""What the names of variants and towers say, and the target that a bundle carries: nothing here builds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from edgeglm.bundle.opened import Bundle
from edgeglm.engines.plan import ShapeRange
from edgeglm.targets.build_options import Range
from edgeglm.targets.schema import ResolvedTarget, load_target, resolve_target, resolved_from_toml

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")
_MODEL = re.compile(r"models/([a-z0-9][a-z0-9_.-]*)/(image|text)\.onnx")


def variants_of(files: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return ``{variant: towers}`` from the listing of a quantize artifact."""
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(files):
        if match := _MODEL.fullmatch(name):
            found[match[1]] = (*found.get(match[1], ()), match[2])
    return found


def precision_of(variant: str) -> str:
    """Return the precision that a variant's name begins with: that of ``int8-qdq`` is ``int8``."""
    return variant.split("-")[0]


def tower_profiles(
    tower: str, batch: Range, length: Range, buckets: Sequence[int]
) -> tuple[dict[str, ShapeRange], ...]:
    """Return the profile for any shape, and one a bucket: a single shape for each batch and length.

    Args:
        tower: Which.
        batch: The least, the usual and the largest batch.
        length: The same of a text's tokens; the buckets are those of the runner up to the largest.
        buckets: The batches that get profiles of their own.
    """
    from edgeglm.engines.profiles import default_length_buckets  # which needs NumPy, as judging does not

    lengths = default_length_buckets(length[2]) if tower == "text" else (0,)
    single = [
        tower_profile(tower, (size, size, size), (tokens, tokens, tokens))
        for tokens in lengths
        for size in buckets
    ]
    return (tower_profile(tower, batch, length), *single)


def tower_profile(tower: str, batch: Range, length: Range) -> dict[str, ShapeRange]:
    """Return one optimization profile of a tower by its contract; -1 keeps the graph's own size."""
    if tower == "image":
        low, usual, high = ((size, -1, -1, -1) for size in batch)
        return {"pixels": ShapeRange(min=low, opt=usual, max=high)}
    low2, usual2, high2 = zip(batch, length, strict=True)
    tokens = ShapeRange(min=low2, opt=usual2, max=high2)
    return {"input_ids": tokens, "attention_mask": tokens}


def target_of(bundle: Bundle) -> ResolvedTarget:
    """Return the target that a bundle carries, or the shipped profile of that name."""
    if "target.toml" in bundle.manifest.files:
        text = bundle.file("target.toml").read_text("utf-8", "replace")
        return resolved_from_toml(text, origin=f"{bundle.origin}: target.toml")
    return resolve_target(load_target(bundle.manifest.target.name))
