"""Tensors there and back, and bytes that are none."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeglm.core.errors import UserError
from edgeglm.serve.tensors import (
    DATATYPES,
    array_from_bytes,
    array_from_json,
    bytes_from_array,
    datatype_of,
)
from edgeglm.serve.v2_messages import infer_request
from edgeglm.serve.whole_requests import Heads

NUMERIC = [dtype for name, dtype in DATATYPES.items() if name != "BYTES"]


@given(st.sampled_from(NUMERIC).flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(max_dims=4))))
def test_every_array_comes_back_from_its_bytes(array: np.ndarray):
    found = array_from_bytes("x", datatype_of(array.dtype.name), array.shape, bytes_from_array(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_byte_strings_come_back_whole(elements: list[bytes]):
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    found = array_from_bytes("x", "BYTES", (len(elements),), bytes_from_array(array))
    assert list(found) == elements


@given(
    st.sampled_from(["bool", "uint8", "int64", "float32", "float64"]).flatmap(
        lambda dtype: arrays.arrays(
            dtype,
            arrays.array_shapes(max_dims=3),
            elements={"allow_nan": False, "allow_infinity": False} if "float" in dtype else None,
        )
    )
)
def test_numbers_in_json_come_back_nested_or_flat(array: np.ndarray):
    for data in (array.tolist(), array.ravel().tolist()):
        found = array_from_json("x", datatype_of(array.dtype.name), array.shape, data)
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [("INT64", [1.5]), ("INT64", [True]), ("UINT8", [256]), ("INT8", [-129]), ("FP32", ["a"]),
     ("FP32", [None]), ("INT64", [2**70]), ("BOOL", [1]), ("FP32", [[1], [2, 3]]), ("FP32", {"a": 1}),
     ("FP32", 3)],
)  # fmt: skip
def test_json_that_does_not_fit_its_datatype_is_refused(datatype: str, data: object):
    with pytest.raises(UserError):
        array_from_json("x", datatype, (1,), data)


@given(st.sampled_from(list(DATATYPES)), st.lists(st.integers(-1, 9), max_size=9), st.binary(max_size=64))
def test_made_up_bytes_are_an_array_or_a_user_error(datatype: str, shape: list[int], data: bytes):
    with contextlib.suppress(UserError):
        assert array_from_bytes("x", datatype, shape, data).shape == tuple(shape)


@given(st.binary(max_size=200), st.none() | st.integers(-5, 300))
def test_made_up_bodies_are_a_request_or_a_user_error(body: bytes, length: int | None):
    with contextlib.suppress(UserError):
        infer_request(body, length)


TENSORS = st.lists(
    st.tuples(
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from(["INT64", "FP32", "BYTES", "FP31"]),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([None, 0, 4, 8, 16, 24]),
    ),
    max_size=3,
)


@given(TENSORS, st.integers(0, 60))
def test_a_request_with_a_known_head_is_read_as_one_with_a_new_head(tensors: list[Any], size: int):
    inputs: list[Any] = []
    for name, datatype, shape, length in tensors:
        parameters = {} if length is None else {"binary_data_size": length}
        inputs.append({"name": name, "shape": shape, "datatype": datatype, "parameters": parameters})
    head, data = json.dumps({"inputs": inputs}).encode(), bytes(range(size))

    def read(head: bytes) -> Any:
        try:
            arrays = infer_request(head + data, len(head))[1]
        except UserError as error:
            return str(error)
        return [(name, a.dtype, a.shape, a.tolist()) for name, a in arrays.items()]

    padded = head + b" " * 4096  # too long to be kept
    assert repr(read(head)) == repr(read(head)) == repr(read(padded))


@given(st.binary(max_size=300))
def test_only_whole_requests_take_the_short_way(tail: bytes):
    head = b"POST /v2/models/text/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"
    heads = Heads()
    for _ in range(2):  # a head that is known is no other than one that is new
        found = heads.whole_request(head + tail)
        assert (found is not None) == (len(tail) == 4)
        assert found is None or (found[1], found[0].path) == (tail, "/v2/models/text/infer")
        assert heads.whole_request(head + b"abcd") is not None
        for strange in (b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Host: b\r\n"):
            assert heads.whole_request(head.replace(b"Content", strange + b"Content") + b"abcd") is None
