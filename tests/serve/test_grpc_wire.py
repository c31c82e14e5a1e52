"""If these fail, a request over gRPC is answered for other tensors than it sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.engines.protocol import TensorSpec
from edgeglm.serve.grpc_messages import infer_arrays, limits_of, message
from edgeglm.serve.grpc_wire import asked_from_bytes, bytes_of_answer
from edgeglm.serve.models import Model
from edgeglm.serve.tensors import DATATYPES, bytes_from_array

NAMES = st.sampled_from(["input_ids", "attention_mask", "x"])


@st.composite
def requests(draw: st.DrawFn) -> Any:
    """Requests of every kind, most of them right."""
    request = message("ModelInferRequest")(
        model_name=draw(st.sampled_from(["text", "image", ""])), id=draw(st.sampled_from(["", "a"]))
    )
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["INT64", "FP32", "BYTES", "BOOL", "FP31"]))
        shape = draw(st.lists(st.integers(-1, 3), min_size=0, max_size=3))
        tensor = request.inputs.add(name=draw(NAMES), datatype=kind, shape=shape)
        if draw(st.integers(0, 9)) == 0:
            tensor.parameters["shared_memory_region"].string_param = "r"
        if draw(st.integers(0, 9)) == 0:
            tensor.contents.int64_contents.extend([1, 2])
        size = {"INT64": 8, "FP32": 4}.get(kind, 1) * abs(int(np.prod(shape, dtype=np.int64)))
        if draw(st.integers(0, 9)):
            request.raw_input_contents.append(bytes(draw(st.sampled_from([size, size, size, size + 1]))))
    if draw(st.booleans()):
        request.parameters["timeout"].int64_param = draw(st.integers(-1, 10**6))
    return request


def both(data: bytes) -> tuple[Any, Any]:
    """Read bytes here and as a message; return what is found, or the words of the refusal."""

    def tried(read: Any) -> Any:
        try:
            return read()
        except UserError as error:
            return str(error)

    def slowly() -> Any:
        request = message("ModelInferRequest").FromString(data)
        return infer_arrays(request), limits_of(request), request.model_name, request.id

    def quickly() -> Any:
        asked = asked_from_bytes(data, lambda *_: None)
        request = asked.request
        return asked.arrays, (asked.deadline, asked.priority), request.model_name, request.id

    return tried(slowly), tried(quickly)


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    same = list(one[0]) == list(other[0]) and one[1:] == other[1:]
    return same and all(
        (array.dtype, array.shape, array.tobytes())
        == (other[0][name].dtype, other[0][name].shape, other[0][name].tobytes())
        for name, array in one[0].items()
        if array.dtype != object
    )


@given(requests())
def test_bytes_say_what_the_message_says_and_are_refused_for_the_same_reason(request: Any):
    assert alike(*both(request.SerializeToString()))
    assert alike(*both(request.SerializeToString())), "also the second time"


@given(requests(), st.data())
def test_bytes_that_are_cut_or_changed_are_read_as_the_message_or_refused(request: Any, data: st.DataObject):
    whole = bytearray(request.SerializeToString())
    if whole and data.draw(st.booleans()):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        message("ModelInferRequest").FromString(cut)
    except Exception:
        with pytest.raises(UserError, match="no such message"):
            asked_from_bytes(cut, lambda *_: None)
    else:
        assert alike(*both(cut))


@pytest.mark.parametrize("given_id", ["", "mine"])
@pytest.mark.parametrize("kind", [kind for kind in DATATYPES if kind != "BYTES"])
def test_an_answer_is_the_message_of_the_protocol(kind: str, given_id: str):
    model = Model(
        name="text", tower="text", feed="arrays", inputs=(),
        outputs=(TensorSpec(name="embedding", dtype="float32", shape=("batch", 4)),),
    )  # fmt: skip
    outputs = {"embedding": np.arange(600).reshape(2, 300).astype(DATATYPES[kind]), "b": np.ones(1, bool)}
    request = message("ModelInferRequest")(model_name="text", id=given_id).SerializeToString()
    for _ in range(2):
        asked = asked_from_bytes(request, lambda *_: None)
        answer = bytes_of_answer(asked, model, "f" * 64, outputs, ["embedding", "b"])
        read = message("ModelInferResponse").FromString(answer)
        assert (read.model_name, read.model_version, read.id) == ("text", "f" * 64, given_id)
        assert [(one.name, one.datatype, list(one.shape)) for one in read.outputs] == [
            ("embedding", kind, [2, 300]),
            ("b", "BOOL", [1]),
        ]
        assert list(read.raw_output_contents) == [bytes_from_array(outputs[name]) for name in outputs]


def test_an_unknown_model_is_told_before_its_tensors_are_looked_at():
    request = message("ModelInferRequest")(model_name="nothing")
    request.inputs.add(name="x", datatype="FP31", shape=[1])
    request.raw_input_contents.append(b"x")

    def find(name: str, version: str) -> None:
        raise UserError(f"unknown model {name}")

    with pytest.raises(UserError, match="unknown model nothing"):
        asked_from_bytes(request.SerializeToString(), find)
