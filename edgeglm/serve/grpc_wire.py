"""ModelInfer's messages as bytes: what a caller repeats is read and written once.

A client that asks again sends the same message but for its tensors, which are the last field. What comes
before them is therefore kept with what it says, and the tensors are views of the bytes. Whatever is not in
that form is read as a message.

Source: Protocol Buffers, "Encoding": a field is a varint of its number and wire type, and for wire type 2 a
varint of its length, then itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from edgeglm.core.errors import UserError
from edgeglm.runtime.requests import Array
from edgeglm.serve.grpc_messages import infer_arrays, infer_response, limits_of, message
from edgeglm.serve.models import Model
from edgeglm.serve.tensors import MOST_DIMENSIONS, NUMBERS, bytes_from_array, datatype_of_array

_RAW_INPUT = 7 << 3 | 2  # ModelInferRequest.raw_input_contents
_RAW_OUTPUT = b"\x32"  # ModelInferResponse.raw_output_contents: field 6, with a length
_KEPT_BYTES = 2048

Part = tuple[str, np.dtype[Any], int, tuple[int, ...]]
Shapes = tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """An inference request that was read.

    Attributes:
        request: The message, whose tensors may be missing.
        arrays: ``{input: array}``, views of what came where they can be.
        deadline: Seconds that the request allows itself; None for no limit.
        priority: The smaller, the sooner.
    """

    request: Any
    arrays: Mapping[str, Array]
    deadline: float | None
    priority: int


@dataclass(frozen=True, slots=True)
class _Head:
    request: Any
    parts: tuple[Part, ...]  # none where the long way must tell what is wrong
    deadline: float | None
    priority: int


def asked_from_bytes(data: bytes, find: Callable[[str, str], object]) -> Asked:
    """Read a ModelInferRequest. Arguments and errors are those of ``asked_from_message``."""
    ends = _tensors(data)
    if ends is not None:
        head = _known(data[: ends[0]])
        if len(head.parts) == len(ends) // 2:
            arrays = {}
            for part, at, end in zip(head.parts, ends[1::2], ends[2::2], strict=True):
                name, dtype, count, shape = part
                if end - at != count * dtype.itemsize:
                    break
                arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
            else:
                return Asked(head.request, arrays, head.deadline, head.priority)
    return asked_from_message(_message(data), find)


def asked_from_message(request: Any, find: Callable[[str, str], object]) -> Asked:
    """Read the message itself.

    Args:
        request: A ModelInferRequest.
        find: Called with name and version of the model before tensors are read; raises for an unknown one.

    Raises:
        UserError: What is no such message, or does not fit together.
    """
    find(request.model_name, request.model_version)
    return Asked(request, infer_arrays(request), *limits_of(request))


def bytes_of_answer(
    asked: Asked, model: Model, version: str, outputs: Mapping[str, Array], wanted: list[str]
) -> bytes:
    """Write a ModelInferResponse, its tensors raw."""
    if asked.request.id:
        return bytes(infer_response(asked.request, model, version, outputs, wanted).SerializeToString())
    parts = [_known_answer(model.name, version, tuple([_shaped(name, outputs[name]) for name in wanted]))]
    for name in wanted:
        blob = bytes_from_array(outputs[name])
        parts += (_RAW_OUTPUT, _varint(len(blob)), blob)
    return b"".join(parts)


def _shaped(name: str, array: Array) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    return name, array.dtype, array.shape


@lru_cache(maxsize=256)
def _known_answer(name: str, version: str, shapes: Shapes) -> bytes:
    answer = message("ModelInferResponse")(model_name=name, model_version=version)
    for output, dtype, shape in shapes:
        answer.outputs.add(name=output, datatype=datatype_of_array(dtype), shape=shape)
    return bytes(answer.SerializeToString())


@lru_cache(maxsize=256)
def _known(head: bytes) -> _Head:
    """Read what comes before the tensors: small, and the same in every request of a caller."""
    request = _message(head)
    parts: list[Part] = []
    for tensor in request.inputs:
        kind, shape = NUMBERS.get(tensor.datatype), tuple(tensor.shape)
        plain = kind is not None and 0 < len(shape) <= MOST_DIMENSIONS and min(shape) > 0
        if not plain or "shared_memory_region" in tensor.parameters or tensor.name in {p[0] for p in parts}:
            return _Head(request, (), None, 1)
        assert kind is not None
        parts.append((tensor.name, kind, math.prod(shape), shape))
    try:
        return _Head(request, tuple(parts), *limits_of(request))
    except UserError:
        return _Head(request, (), None, 1)


def _tensors(data: bytes) -> list[int] | None:
    """Return where the head ends, and then beginning and end of each tensor; None in any other form."""
    at, size = 0, len(data)
    found: list[int] = []
    while at < size:
        tag = data[at]
        if tag & 7 != 2 or tag >= 0x80:  # a field without a length, or one that is not the protocol's
            return None
        if tag == _RAW_INPUT:
            if not found:
                if at > _KEPT_BYTES:
                    return None
                found.append(at)
        elif found:
            return None  # the tensors are not the last
        length, shift, at = 0, 0, at + 1
        while True:
            if at >= size or shift > 28:
                return None
            byte = data[at]
            length |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                break
        if tag == _RAW_INPUT:
            found += (at, at + length)
        at += length
    return found if found and at == size else None


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _message(data: bytes) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return message("ModelInferRequest").FromString(data)
    except DecodeError:
        raise UserError("the bytes are no such message; send what the protocol describes") from None
