"""Which shapes an engine is built for, and which context of a plan serves a call.

A plan has one profile for any shape, and *buckets*: single shapes, each with an execution context and a CUDA
graph of its own. Native TensorRT tunes a profile for each. TensorRT-RTX compiles for the very shape on the
device, and each profile would put the weights into the plan again, so there the buckets share one.
A batch that is no bucket is filled up to the next one, at most to twice its rows; anything else takes the
context for any shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgeglm.engines.plan import PlanMetadata, Shape, ShapeRange, TensorRecord
from edgeglm.engines.protocol import Array

_FILL = 2


def default_length_buckets(longest: int) -> tuple[int, ...]:
    """Return lengths that grow by a third to a half up to ``longest``: 8, 12, 16, 24, 32, 48, ...

    Padding within a bucket then costs less than a third of the work, and there are few enough buckets
    for each to fill up under load.
    """
    lengths, step = [], 8
    while step < longest:
        lengths += [step, step + step // 2]
        step *= 2
    return (*(length for length in lengths if length < longest), longest)


def in_length_bucket(tokens_BL: Array, longest: int, value: int) -> Array:
    """Fill rows up with ``value`` to the next of ``default_length_buckets(longest)``."""
    length = tokens_BL.shape[1]
    bucket = next(size for size in default_length_buckets(longest) if size >= length)
    return np.pad(tokens_BL, ((0, 0), (0, bucket - length)), constant_values=value)


def is_fixed(ranges: Mapping[str, ShapeRange]) -> bool:
    """Return whether a profile is a single shape."""
    return all(shapes.min == shapes.max for shapes in ranges.values())


def whole_ranges(metadata: PlanMetadata) -> tuple[dict[str, ShapeRange], ...]:
    """Return what each context of a plan covers: its profiles, then its buckets, no input left out."""
    profiles: Sequence[Mapping[str, ShapeRange]] = metadata.profiles or ({},)
    buckets = [{name: _only(shape) for name, shape in bucket.items()} for bucket in metadata.buckets]
    return tuple(
        {record.name: ranges.get(record.name) or _only(record.shape) for record in metadata.inputs}
        for ranges in (*profiles, *buckets)
    )


def profile_of(metadata: PlanMetadata, context: int) -> int:
    """Return the profile of a context by its place in ``whole_ranges``.

    Contexts of one engine may share a profile since TensorRT 10.0 (PreviewFeature::kPROFILE_SHARING_0806).
    """
    count = max(1, len(metadata.profiles))
    if context < count:
        return context
    shapes = metadata.buckets[context - count]
    covering = (
        index
        for index, ranges in enumerate(metadata.profiles)
        if all(_within(shape, ranges[name]) for name, shape in shapes.items() if name in ranges)
    )
    return next(covering, 0)


class ProfileChoice:
    """Chooses the profile of a call by the shapes of its feeds.

    Args:
        profiles: As ``whole_ranges`` makes them.
        inputs: What the plan takes.
        outputs: What it gives. Rows are filled up only where all tensors have a dynamic axis 0.
    """

    def __init__(
        self,
        profiles: Sequence[Mapping[str, ShapeRange]],
        inputs: Sequence[TensorRecord],
        outputs: Sequence[TensorRecord],
    ) -> None:
        self._profiles = profiles
        self._batched = all(record.shape[:1] == (-1,) for record in (*inputs, *outputs))
        buckets = [index for index, ranges in enumerate(profiles) if is_fixed(ranges)]
        self._buckets = sorted(buckets, key=self._rows)
        self._rest = [index for index in range(len(profiles)) if index not in buckets]
        self._known: dict[tuple[Shape, ...], tuple[int, dict[str, Shape]] | None] = {}

    @property
    def bucket_batches(self) -> tuple[int, ...]:
        """The batch sizes that there are buckets for, rising."""
        return tuple(sorted({self._rows(index) for index in self._buckets})) if self._batched else ()

    def of(self, shapes: Mapping[str, Shape]) -> tuple[int, dict[str, Shape]] | None:
        """Return the profile and the shapes to run with, or None if no profile takes them."""
        key = tuple(shapes.values())
        if key not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[key] = self._searched(shapes)
        return self._known[key]

    def _searched(self, shapes: Mapping[str, Shape]) -> tuple[int, dict[str, Shape]] | None:
        for index in self._buckets:
            largest = {name: self._profiles[index][name].max for name in shapes}
            if all(shape == largest[name] for name, shape in shapes.items()):
                return index, largest
            if self._batched and all(self._fills(shape, largest[name]) for name, shape in shapes.items()):
                return index, largest
        for index in self._rest:
            ranges = self._profiles[index]
            if all(_within(shape, ranges[name]) for name, shape in shapes.items()):
                return index, dict(shapes)
        return None

    def _fills(self, shape: Shape, bucket: Shape) -> bool:
        return shape[1:] == bucket[1:] and shape[0] <= bucket[0] <= _FILL * shape[0]

    def _rows(self, index: int) -> int:
        return min((shapes.max[0] for shapes in self._profiles[index].values() if shapes.max), default=0)


def _only(shape: Shape) -> ShapeRange:
    return ShapeRange(min=shape, opt=shape, max=shape)


def _within(shape: Shape, ranges: ShapeRange) -> bool:
    return all(low <= size <= high for low, size, high in zip(ranges.min, shape, ranges.max, strict=True))
