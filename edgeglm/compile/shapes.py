"""Optimization profiles against the graph they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeglm.compile.trt_api import Network, Tensor
from edgeglm.core.errors import UserError
from edgeglm.engines.plan import ShapeRange, TensorRecord

DYNAMIC = -1


def tensor_records(network: Network) -> tuple[tuple[TensorRecord, ...], tuple[TensorRecord, ...]]:
    """Return the inputs and outputs of a parsed network."""
    inputs = tuple(_record(network.get_input(index)) for index in range(network.num_inputs))
    outputs = tuple(_record(network.get_output(index)) for index in range(network.num_outputs))
    return inputs, outputs


def whole_profiles(
    inputs: Sequence[TensorRecord], profiles: Sequence[Mapping[str, ShapeRange]], graph: str
) -> tuple[dict[str, ShapeRange], ...]:
    """Return the profiles with every -1 replaced by the graph's fixed size.

    Raises UserError when a dynamic input is not covered, a name is unknown, a range is not
    ``min <= opt <= max``, or a range contradicts a fixed size.
    """
    dynamic = [record for record in inputs if DYNAMIC in record.shape]
    if not profiles and dynamic:
        raise UserError(f"{graph}: {dynamic[0].name} has dynamic dimensions; give an optimization profile")
    return tuple(_whole(dynamic, {record.name: record for record in inputs}, p, graph) for p in profiles)


def _whole(
    dynamic: Sequence[TensorRecord],
    known: Mapping[str, TensorRecord],
    profile: Mapping[str, ShapeRange],
    graph: str,
) -> dict[str, ShapeRange]:
    for name in profile:
        if name not in known:
            raise UserError(f"{graph}: no input is named {name!r}; its inputs are {', '.join(known)}")
    for record in dynamic:
        if record.name not in profile:
            raise UserError(f"{graph}: {record.name} is dynamic; give it a range in every profile")
    return {name: _range(known[name], shapes, graph) for name, shapes in profile.items()}


def _range(record: TensorRecord, shapes: ShapeRange, graph: str) -> ShapeRange:
    where = f"{graph}: the profile of {record.name}"
    filled = []
    for shape in (shapes.min, shapes.opt, shapes.max):
        if len(shape) != len(record.shape):
            raise UserError(f"{where} has shape {shape}; give it {len(record.shape)} dimensions")
        whole = tuple(own if size == DYNAMIC else size for size, own in zip(shape, record.shape, strict=True))
        for size, own in zip(whole, record.shape, strict=True):
            if size < 1:
                raise UserError(f"{where} leaves a dynamic dimension open in {shape}; give it a size")
            if own not in (DYNAMIC, size):
                raise UserError(f"{where} asks for {size} where the graph has {own}; use {own}, or -1")
        filled.append(whole)
    low, best, high = filled
    if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
        raise UserError(f"{where} is {low}, {best}, {high}; order it as min <= opt <= max")
    return ShapeRange(min=low, opt=best, max=high)


def _record(tensor: Tensor) -> TensorRecord:
    dtype = str(tensor.dtype).rpartition(".")[2].lower()
    return TensorRecord(name=tensor.name, dtype=_NAMES.get(dtype, dtype), shape=tuple(tensor.shape))


_NAMES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}
