"""Tensors as the Open Inference Protocol writes them: datatypes, the binary form, and the JSON form.

Source: the Open Inference Protocol, "Tensor Data Types", and Triton's "Binary Tensor Data" extension:
numbers little-endian and row-major, BYTES as a 4-byte little-endian length before each element.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError, unknown_name

Array = npt.NDArray[Any]

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype).newbyteorder("<") for name, dtype in DATATYPES.items()
}
NUMBERS = {name: dtype for name, dtype in _DTYPES.items() if name != "BYTES"}
"""Little-endian dtypes of what has a fixed size."""
MOST_DIMENSIONS = 8
_KINDS = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}  # kind of the tensor: kinds of JSON that fit it
_LENGTH = struct.Struct("<I")


def datatype_of(dtype: str) -> str:
    """Return the protocol's name of a numpy dtype, such as FP32 for float32."""
    return _NAMES[dtype]


@cache
def datatype_of_array(dtype: np.dtype[Any]) -> str:
    """Return the same for a dtype itself; numpy makes up its name anew each time, in Python."""
    return _NAMES[dtype.name]


def array_from_bytes(
    name: str, datatype: str, shape: Sequence[int], data: bytes, at: int = 0, size: int | None = None
) -> Array:
    """Read the binary form, ``size`` bytes of ``data`` from ``at``. Returns a view, except for BYTES.

    Raises UserError for an unknown datatype, a negative dimension, or a length that does not fit.
    """
    size = len(data) - at if size is None else size
    if datatype == "BYTES":
        return _elements(name, _count(name, shape), data[at : at + size]).reshape(shape)
    try:
        dtype, count = _layout(datatype, tuple(shape))
    except UserError:
        dtype, count = _dtype(name, datatype), _count(name, shape)  # which says of what
    if size != count * dtype.itemsize:
        raise UserError(
            f"{name} has {size} bytes and its shape {list(shape)} of {datatype} takes "
            f"{count * dtype.itemsize}; send as many as the shape says"
        )
    if not count:
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype, count, at).reshape(shape)


def array_from_json(name: str, datatype: str, shape: Sequence[int], data: object) -> Array:
    """Read numbers, or strings for BYTES, nested as the shape is or flat.

    Raises UserError for elements of another kind, that do not fit the datatype, or in another number.
    """
    count = _count(name, shape)
    if datatype == "BYTES":
        flat = list(_flattened(data))
        if not all(isinstance(element, str) for element in flat) or len(flat) != count:
            raise UserError(f"{name} must be {count} strings; give as many as its shape says")
        return _objects([str(element).encode() for element in flat]).reshape(shape)
    dtype = _dtype(name, datatype)
    try:
        found: Array = np.array(data)
    except (ValueError, OverflowError, TypeError):
        found = np.array(None)
    if found.dtype.kind not in _KINDS[dtype.kind] or (found.shape != tuple(shape) and found.ndim != 1):
        raise UserError(
            f"{name} must be {datatype} of shape {list(shape)}; give numbers nested like that, or flat"
        )
    if found.size != count:
        raise UserError(
            f"{name} has {found.size} elements and its shape {list(shape)} {count}; make them equal"
        )
    if dtype.kind in "iu" and found.size:
        bounds = np.iinfo(dtype)
        if int(found.min()) < bounds.min or int(found.max()) > bounds.max:
            raise UserError(f"{name} has numbers that {datatype} cannot hold; use a wider model input")
    with np.errstate(over="ignore"):
        return found.astype(dtype).reshape(shape)


def bytes_from_array(array: Array) -> bytes:
    """Write the binary form."""
    if array.dtype.kind == "O":
        parts = []
        for element in array.ravel():
            parts += [_LENGTH.pack(len(element)), element]
        return b"".join(parts)
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


@lru_cache(maxsize=1024)
def _layout(datatype: str, shape: tuple[int, ...]) -> tuple[np.dtype[Any], int]:
    return _dtype("", datatype), _count("", shape)


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    if datatype not in _DTYPES:
        raise unknown_name(f"datatype of {name}:", datatype, DATATYPES)
    return _DTYPES[datatype]


def _count(name: str, shape: Sequence[int]) -> int:
    if len(shape) > MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise UserError(f"{name} has shape {list(shape)[:9]}; give up to 8 dimensions of 0 or more")
    return math.prod(shape)


def _elements(name: str, count: int, data: bytes) -> Array:
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) < count:
        if at + 4 > len(data):
            break
        (length,) = _LENGTH.unpack_from(data, at)
        at += 4
        if at + length > len(data):
            at = len(data) + 1
            break
        elements.append(data[at : at + length])
        at += length
    if at != len(data) or len(elements) != count:
        raise UserError(
            f"{name} does not hold {count} elements of BYTES; write each as 4 bytes of length, then itself"
        )
    return _objects(elements)


def _objects(elements: Sequence[bytes]) -> Array:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def _flattened(data: object) -> Iterable[object]:
    if isinstance(data, list):
        for part in data:
            yield from _flattened(part)
    else:
        yield data
