"""An inference request and its answer over HTTP: JSON, with tensors in it or as bytes behind it.

Source: the Open Inference Protocol, "Inference Request/Response JSON Object", and Triton's "Binary Tensor
Data" extension: ``Inference-Header-Content-Length`` says where the JSON ends and the tensors begin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.runtime.requests import Array
from edgeglm.serve.models import Model
from edgeglm.serve.tensors import (
    MOST_DIMENSIONS,
    NUMBERS,
    array_from_bytes,
    array_from_json,
    bytes_from_array,
    datatype_of_array,
)

Size = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Parameter = str | bool | int | float | None
Parts = tuple[tuple[str, np.dtype[Any], int, int, tuple[int, ...]], ...]
Shapes = tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what callers send: immutable, every key known."""


class InputParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What may be said of an input; other parameters are ignored, as the protocol asks."""

    binary_data_size: Size | None = None
    shared_memory_region: str | None = None


class OutputParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What may be said of an output."""

    binary_data: bool | None = None
    classification: int | None = None
    shared_memory_region: str | None = None


class RequestParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What may be said of a request: ``timeout`` in microseconds; priority 1 goes first, 0 is usual."""

    binary_data_output: bool = False
    timeout: Annotated[int, msgspec.Meta(ge=0)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=0)] = 0
    sequence_id: int | str = 0


class InputTensor(_Message, frozen=True, kw_only=True):
    """One input; ``data`` stays raw until its datatype is known."""

    name: str
    shape: list[Annotated[int, msgspec.Meta(ge=0, le=2**40)]]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: msgspec.Raw = msgspec.Raw()


class WantedOutput(_Message, frozen=True, kw_only=True):
    """One output that is asked for."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferRequest(_Message, frozen=True, kw_only=True):
    """The protocol's inference request."""

    id: str = ""
    parameters: RequestParameters = RequestParameters()
    inputs: list[InputTensor]
    outputs: list[WantedOutput] = []


_KEPT_BYTES = 2048
_decoder = msgspec.json.Decoder(InferRequest)
_encode = msgspec.json.Encoder().encode


def infer_request(body: bytes, json_length: int | None) -> tuple[InferRequest, dict[str, Array]]:
    """Read a body.

    Args:
        body: JSON, and what follows it.
        json_length: Bytes of JSON, by the header; None for all.

    Returns:
        The request and ``{input: array}``, views of the body where the tensors are binary.

    Raises:
        UserError: What is not the protocol, cut off, or longer than it says.
    """
    if json_length is not None and not 0 <= json_length <= len(body):
        raise UserError(
            f"Inference-Header-Content-Length is {json_length} and the body has {len(body)} bytes; "
            "send the length of the JSON"
        )
    end = len(body) if json_length is None else json_length
    if json_length is not None and end <= _KEPT_BYTES:
        request, parts, together = _known_request(body[:end])
        if parts and end + together == len(body):
            return request, {
                name: np.frombuffer(body, dtype, count, end + at).reshape(shape)
                for name, dtype, count, at, shape in parts
            }
    else:
        request = _request(body if json_length is None else body[:end])
    arrays: dict[str, Array] = {}
    for tensor in request.inputs:
        if tensor.name in arrays:
            raise UserError(f"input {tensor.name!r} is there twice; send it once")
        if tensor.parameters.shared_memory_region is not None:
            raise UserError("this server shares no memory with callers; send the tensors in the request")
        size = tensor.parameters.binary_data_size
        if size is None:
            arrays[tensor.name] = array_from_json(
                tensor.name, tensor.datatype, tensor.shape, _json_data(tensor)
            )
            continue
        if end + size > len(body):
            raise UserError(
                f"{tensor.name} should have {size} bytes and {len(body) - end} are left; send them all"
            )
        if bytes(tensor.data):
            raise UserError(f"{tensor.name} has 'data' and binary_data_size; send one of them")
        arrays[tensor.name] = array_from_bytes(tensor.name, tensor.datatype, tensor.shape, body, end, size)
        end += size
    if end != len(body):
        raise UserError(f"{len(body) - end} bytes follow the last tensor; send what the request says")
    return request, arrays


def _request(text: bytes) -> InferRequest:
    try:
        return _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the body is no inference request: {error}; send what the protocol says") from None


@lru_cache(maxsize=256)
def _known_request(text: bytes) -> tuple[InferRequest, Parts, int]:
    """Return the same for JSON before binary tensors, which says only what they are: a client repeats it.

    With it come where each tensor lies behind the JSON and how many bytes they have together; no parts
    where one is anything but numbers in good order, which the long way tells.
    """
    request = _request(text)
    parts, at = [], 0
    for tensor in request.inputs:
        size, kind = tensor.parameters.binary_data_size, NUMBERS.get(tensor.datatype)
        if (
            not size
            or kind is None
            or bytes(tensor.data)
            or tensor.parameters.shared_memory_region is not None
        ):
            return request, (), 0
        count, shape = size // kind.itemsize, tuple(tensor.shape)
        if len(shape) > MOST_DIMENSIONS or math.prod(shape) != count or size % kind.itemsize:
            return request, (), 0
        parts.append((tensor.name, kind, count, at, shape))
        at += size
    if len({part[0] for part in parts}) != len(parts):
        return request, (), 0
    return request, tuple(parts), at


def deadline_of(parameters: RequestParameters) -> float | None:
    """Return the seconds that a caller allows, None for no limit."""
    return parameters.timeout / 1e6 if parameters.timeout else None


def priority_of(parameters: RequestParameters) -> int:
    """Return the runner's priority: theirs count from 1, with 0 for the usual one, which is our middle."""
    return min(parameters.priority - 1, 2) if parameters.priority else 1


def infer_answer(
    request: InferRequest, model: Model, version: str, outputs: Mapping[str, Array]
) -> tuple[bytes, int | None]:
    """Write an answer. Returns the body, and the length of its JSON if tensors follow it.

    Raises UserError for an output that the model does not give, or in a form that is not offered.
    """
    if request.parameters.binary_data_output and not request.outputs and not request.id:
        blobs = [bytes_from_array(array) for array in outputs.values()]
        shapes = tuple((name, array.dtype, array.shape) for name, array in outputs.items())
        text = _known_answer(model.name, version, shapes, tuple(map(len, blobs)))
        return b"".join([text, *blobs]), len(text)
    wanted = request.outputs or [WantedOutput(name=name) for name in outputs]
    described: list[dict[str, Any]] = []
    blobs = []
    for output in wanted:
        array = outputs[output.name]
        entry: dict[str, Any] = {
            "name": output.name,
            "datatype": datatype_of_array(array.dtype),
            "shape": array.shape,
        }
        binary = output.parameters.binary_data
        if request.parameters.binary_data_output if binary is None else binary:
            blob = bytes_from_array(array)
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    answer = {"model_name": model.name, "model_version": version, "outputs": described}
    if request.id:
        answer["id"] = request.id
    text = _encode(answer)
    return (b"".join([text, *blobs]), len(text)) if blobs else (text, None)


@lru_cache(maxsize=256)
def _known_answer(name: str, version: str, shapes: Shapes, sizes: tuple[int, ...]) -> bytes:
    described = [
        {
            "name": output,
            "datatype": datatype_of_array(dtype),
            "shape": shape,
            "parameters": {"binary_data_size": size},
        }
        for (output, dtype, shape), size in zip(shapes, sizes, strict=True)
    ]
    return _encode({"model_name": name, "model_version": version, "outputs": described})


def check_wanted(request: InferRequest, model: Model) -> None:
    """Raise UserError for outputs that the model does not give, before it is asked."""
    known = {spec.name for spec in model.outputs} if request.outputs else ()
    for output in request.outputs:
        if output.name not in known:
            raise unknown_name(f"output of model {model.name!r}:", output.name[:100], known)
        if output.parameters.classification:
            raise UserError("this server classifies nothing; leave 'classification' out")
        if output.parameters.shared_memory_region is not None:
            raise UserError("this server shares no memory with callers; leave shared_memory_region out")
    if request.parameters.sequence_id:
        raise UserError("these models keep no state between requests; leave sequence_id out")


def _json_data(tensor: InputTensor) -> object:
    if not bytes(tensor.data):
        raise UserError(f"input {tensor.name!r} has no data; send 'data', or binary_data_size and bytes")
    try:  # what is within was passed over so far
        return msgspec.json.decode(tensor.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the data of {tensor.name[:100]!r} is no JSON: {error}; send it as UTF-8") from None
