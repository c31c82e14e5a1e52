"""The protocol's messages over gRPC, and the way from them to arrays and back.

Classes are made at run time from a descriptor set, in a pool of their own: generated code would demand one
range of protobuf's versions, and could not live beside a client's copy of the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.runtime.requests import Array
from edgeglm.serve.models import Model
from edgeglm.serve.tensors import (
    DATATYPES,
    array_from_bytes,
    array_from_json,
    bytes_from_array,
    datatype_of_array,
)

_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@cache
def _pool() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool

    described = descriptor_pb2.FileDescriptorSet()
    described.ParseFromString(Path(__file__).with_name("open_inference.binpb").read_bytes())
    pool: Any = descriptor_pool.DescriptorPool()
    for file in described.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


@cache
def message(name: str) -> Any:
    """Return the class of a message, such as ``ModelInferRequest``."""
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"inference.{name}"))


@cache
def service_descriptor() -> Any:
    """Return the service, with its methods."""
    return _pool().FindServiceByName("inference.GRPCInferenceService")


def infer_arrays(request: Any) -> dict[str, Array]:
    """Return ``{input: array}`` of a request, views of its bytes where they are raw.

    Raises UserError for what does not fit together.
    """
    raw = request.raw_input_contents
    inputs = request.inputs
    if raw and len(raw) != len(inputs):
        raise UserError(f"{len(raw)} raw contents came for {len(inputs)} inputs; send one for each")
    arrays: dict[str, Array] = {}
    for number, tensor in enumerate(inputs):
        if tensor.name in arrays:
            raise UserError(f"input {tensor.name!r} is there twice; send it once")
        if "shared_memory_region" in tensor.parameters:
            raise UserError("this server shares no memory with callers; send the tensors in the request")
        shape = tuple(tensor.shape)
        if raw:
            arrays[tensor.name] = array_from_bytes(tensor.name, tensor.datatype, shape, raw[number])
        else:
            arrays[tensor.name] = _array_from_contents(tensor, shape)
    return arrays


def _array_from_contents(tensor: Any, shape: tuple[int, ...]) -> Array:
    field = _FIELDS.get(tensor.datatype)
    if field is None:
        if tensor.datatype in DATATYPES:
            raise UserError(f"{tensor.name} of {tensor.datatype} must be raw; send raw_input_contents")
        raise unknown_name(f"datatype of {tensor.name}:", tensor.datatype[:40], DATATYPES)
    values = getattr(tensor.contents, field)
    if tensor.datatype == "BYTES":
        if len(values) != np.prod(shape, dtype=np.int64):
            raise UserError(f"{tensor.name} has {len(values)} elements for shape {list(shape)}; send as many")
        array = np.empty(len(values), dtype=object)
        array[:] = list(values)
        return array.reshape(shape)
    return array_from_json(tensor.name, tensor.datatype, shape, list(values))


def check_wanted(request: Any, model: Model) -> list[str]:
    """Return the outputs that are asked for. Raises UserError for those that the model does not give."""
    known = [spec.name for spec in model.outputs]
    for output in request.outputs:
        if output.name not in known:
            raise unknown_name(f"output of model {model.name!r}:", output.name[:100], known)
        if "classification" in output.parameters or "shared_memory_region" in output.parameters:
            raise UserError("this server gives outputs as they are; leave the output's parameters out")
    return [output.name for output in request.outputs] or known


def infer_response(
    request: Any, model: Model, version: str, outputs: Mapping[str, Array], wanted: list[str]
) -> Any:
    """Write an answer, its tensors raw."""
    answer = message("ModelInferResponse")(model_name=model.name, model_version=version, id=request.id)
    for name in wanted:
        array = outputs[name]
        answer.outputs.add(name=name, datatype=datatype_of_array(array.dtype), shape=array.shape)
        answer.raw_output_contents.append(bytes_from_array(array))
    return answer


def limits_of(request: Any) -> tuple[float | None, int]:
    """Return the seconds that a request allows itself, and its priority. Raises UserError."""
    parameters = request.parameters
    if not parameters:
        return None, 1
    timeout, priority = (_number(parameters, name) for name in ("timeout", "priority"))
    if _number(parameters, "sequence_id"):
        raise UserError("these models keep no state between requests; leave sequence_id out")
    return (timeout / 1e6 if timeout else None), (min(priority - 1, 2) if priority else 1)


def _number(parameters: Any, name: str) -> int:
    if name not in parameters:
        return 0
    value = parameters[name]
    choice = value.WhichOneof("parameter_choice")
    found = getattr(value, choice) if choice in ("int64_param", "uint64_param") else 0 if not choice else -1
    if found < 0:
        raise UserError(f"parameter {name!r} is no number of 0 or more; give one")
    return int(found)
