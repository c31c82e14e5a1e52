"""The unmodified client of Triton against a real server."""

from __future__ import annotations

import asyncio
import gzip
import json
import queue
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeglm import __version__
from scripts.fixtures.colours import COLOURS, SIDE, picture
from tests.serve.asking import IDENTITY, TEXT, asked_json, refused, shed
from tests.serve.conftest import TOKEN, Server, running, serve_command
from tests.serve.test_server_limits import self_signed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # how the client is written is its own matter
    import tritonclient.grpc as over_grpc
    import tritonclient.grpc.aio as over_grpc_aio
    import tritonclient.http as over_http
    import tritonclient.http.aio as over_http_aio
    from tritonclient.utils import InferenceServerException

FACES: list[Any] = [over_http, over_grpc]
FACES_AIO: list[Any] = [over_http_aio, over_grpc_aio]


def address(server: Server, face: Any) -> str:
    return server.grpc if "grpc" in face.__name__ else server.address


def text_inputs(face: Any, ids: list[list[int]], **binary: bool) -> list[Any]:
    array = np.array(ids, np.int64)
    found = []
    for name, values in (("input_ids", array), ("attention_mask", np.ones_like(array))):
        tensor = face.InferInput(name, list(values.shape), "INT64")
        tensor.set_data_from_numpy(values, **binary)
        found.append(tensor)
    return found


def raw_input(face: Any, name: str, values: list[bytes]) -> Any:
    tensor = face.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=object))
    return tensor


@pytest.mark.parametrize("face", FACES, ids=["http", "grpc"])
def test_the_client_finds_the_server_and_its_models(server: Server, face: Any):
    with face.InferenceServerClient(address(server, face)) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("text")
        assert not client.is_model_ready("tex")
        options = {"as_json": True} if face is over_grpc else {}
        found = client.get_server_metadata(**options)
        assert (found["name"], found["version"]) == ("edgeglm", __version__)
        metadata = client.get_model_metadata("image", **options)
        shape = [int(size) for size in metadata["inputs"][0]["shape"]]
        assert (metadata["inputs"][0]["datatype"], shape) == ("FP32", [-1, 3, SIDE, SIDE])
        assert len(metadata["versions"][0]) == 64
        config = client.get_model_config("text", **options)
        config = config.get("config", config)
        assert config["max_batch_size"] == 64
        assert [entry["data_type"] for entry in config["input"]] == ["TYPE_INT64", "TYPE_INT64"]
        index = client.get_model_repository_index(**options)
        index = index["models"] if face is over_grpc else index
        assert [entry["name"] for entry in index] == ["embed_image", "embed_text", "image", "text"]
        assert {entry["state"] for entry in index} == {"READY"}
        client.infer("text", text_inputs(face, [[0]]))
        given_up = time.monotonic() + 10
        while True:  # the books of a call are closed after its answer has gone out
            stats = client.get_inference_statistics("text", **options)["model_stats"][0]
            timed = {
                name: {key: int(value) for key, value in stats["inference_stats"][name].items()}
                for name in ("success", "queue", "compute_infer")
            }
            counts = {one["count"] for one in timed.values()}
            if counts == {int(stats["execution_count"])} or time.monotonic() > given_up:
                break
        assert counts == {int(stats["execution_count"])}
        assert int(stats["inference_count"]) >= 1
        assert min(one["ns"] for one in timed.values()) > 0
        parts = timed["queue"]["ns"] + timed["compute_infer"]["ns"]
        assert abs(timed["success"]["ns"] - parts) <= 1  # each is rounded


@pytest.mark.parametrize("face", FACES, ids=["http", "grpc"])
def test_rows_come_back_in_their_order(server: Server, face: Any):
    with face.InferenceServerClient(address(server, face)) as client:
        answer = client.infer("text", text_inputs(face, [[2, 1], [0, 0], [1, 2]]), request_id="mine")
        np.testing.assert_array_equal(answer.as_numpy("embedding"), np.eye(3, dtype=np.float32)[[2, 0, 1]])
        response = answer.get_response(as_json=True) if face is over_grpc else answer.get_response()
        assert response["id"] == "mine"
        assert len(response["model_version"]) == 64


@pytest.mark.parametrize("face", FACES, ids=["http", "grpc"])
def test_raw_text_and_image_files_are_models_too(server: Server, face: Any):
    with face.InferenceServerClient(address(server, face)) as client:
        answer = client.infer("embed_text", [raw_input(face, "text", [b"blue", b"red"])])
        np.testing.assert_array_equal(answer.as_numpy("embedding"), np.eye(3)[[2, 0]])
        answer = client.infer("embed_image", [raw_input(face, "image", [picture(COLOURS["green"])])])
        np.testing.assert_allclose(answer.as_numpy("embedding"), [[0, 1, 0]], atol=1e-6)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("way", [None, "gzip", "deflate"])
def test_tensors_travel_over_http_in_json_in_binary_and_compressed(server, binary_in, binary_out, way):
    with over_http.InferenceServerClient(server.address) as client:
        answer = client.infer(
            "text",
            text_inputs(over_http, [[0], [1]] * 16, binary_data=binary_in),
            outputs=[over_http.InferRequestedOutput("embedding", binary_data=binary_out)],
            request_compression_algorithm=way,
            response_compression_algorithm=way,
        )
        np.testing.assert_array_equal(answer.as_numpy("embedding"), np.eye(3)[[0, 1] * 16])


def test_the_asynchronous_calls_of_the_synchronous_clients(server: Server):
    with over_http.InferenceServerClient(server.address, concurrency=4) as client:
        calls = [client.async_infer("text", text_inputs(over_http, [[word]])) for word in (2, 0, 1)]
        rows = [call.get_result().as_numpy("embedding")[0] for call in calls]
    np.testing.assert_array_equal(rows, np.eye(3)[[2, 0, 1]])
    answers: queue.Queue[Any] = queue.Queue()
    with over_grpc.InferenceServerClient(server.grpc) as grpc_client:
        grpc_client.async_infer(
            "text", text_inputs(over_grpc, [[1]]), callback=lambda result, error: answers.put((result, error))
        )
        result, error = answers.get(timeout=10)
    assert error is None
    np.testing.assert_array_equal(result.as_numpy("embedding"), [[0, 1, 0]])


@pytest.mark.parametrize("face", FACES_AIO, ids=["http", "grpc"])
def test_the_asyncio_clients(server: Server, face: Any):
    async def main() -> None:
        async with face.InferenceServerClient(address(server, face)) as client:
            assert await client.is_server_ready()
            answers = await asyncio.gather(
                *(client.infer("text", text_inputs(face, [[word]])) for word in (2, 0, 1))
            )
            rows = [answer.as_numpy("embedding")[0] for answer in answers]
            np.testing.assert_array_equal(rows, np.eye(3)[[2, 0, 1]])

    asyncio.run(main())


def test_a_stream_answers_in_order_and_outlives_a_bad_request(server: Server):
    answers: queue.Queue[Any] = queue.Queue()
    with over_grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for word in (0, 1, 2):
            client.async_stream_infer("text", text_inputs(over_grpc, [[word]]), request_id=str(word))
        client.async_stream_infer("nothing", text_inputs(over_grpc, [[0]]))
        client.async_stream_infer("text", text_inputs(over_grpc, [[1]]), enable_empty_final_response=True)
        found = [answers.get(timeout=10) for _ in range(5)]
        client.stop_stream()
    rows = [result.as_numpy("embedding")[0] for result, error in found if error is None]
    np.testing.assert_array_equal(rows, np.eye(3)[[0, 1, 2, 1]])
    assert [result.get_response().id for result, _ in found[:3]] == ["0", "1", "2"]
    assert "unknown model 'nothing'" in str(found[3][1])
    assert found[4][0].get_response().parameters["triton_final_response"].bool_param


@pytest.mark.parametrize("face", FACES, ids=["http", "grpc"])
@pytest.mark.parametrize(
    ("name", "dtype", "array", "words"),
    [
        ("input_ids", "INT32", np.zeros((1, 2), np.int32), "int32"),
        ("ids", "INT64", np.zeros((1, 2), np.int64), "no feed for input_ids"),
        ("input_ids", "INT64", np.zeros((1, 9), np.int64), "9"),
        ("input_ids", "INT64", np.zeros((2, 2), np.int64), "rows"),
        ("input_ids", "INT64", np.zeros((0, 2), np.int64), "rows"),
        ("input_ids", "INT64", np.zeros((1, 2, 1), np.int64), "shape"),
    ],
)
def test_wrong_names_shapes_and_dtypes_are_told(server: Server, face: Any, name, dtype, array, words):
    wrong = face.InferInput(name, list(array.shape), dtype)
    wrong.set_data_from_numpy(array)
    with face.InferenceServerClient(address(server, face)) as client:
        inputs = [wrong, *text_inputs(face, [[0, 0]])[1:]]
        with pytest.raises(InferenceServerException, match=words):
            client.infer("text", inputs)
        with pytest.raises(InferenceServerException, match=r"unknown model 'txt'; .* did you mean 'text'"):
            client.infer("txt", inputs)
        with pytest.raises(InferenceServerException, match="no version"):
            client.infer("text", text_inputs(face, [[0]]), model_version="7")
        wanted = [face.InferRequestedOutput("vector")]
        with pytest.raises(InferenceServerException, match="unknown output"):
            client.infer("text", text_inputs(face, [[0]]), outputs=wanted)


@pytest.mark.parametrize("face", FACES, ids=["http", "grpc"])
def test_numbers_that_are_none_ids_of_no_token_and_texts_that_are_no_utf8_are_told(server: Server, face: Any):
    pixels = np.full((1, 3, SIDE, SIDE), np.nan, np.float32)
    tensor = face.InferInput("pixels", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels)
    with face.InferenceServerClient(address(server, face)) as client:
        with pytest.raises(InferenceServerException, match="NaN or infinity"):
            client.infer("image", [tensor])
        with pytest.raises(InferenceServerException, match="UTF-8 at byte 1"):
            client.infer("embed_text", [raw_input(face, "text", [b"a\xff"])])
        with pytest.raises(InferenceServerException, match="not an image"):
            client.infer("embed_image", [raw_input(face, "image", [b"GIF"])])
        with pytest.raises(InferenceServerException, match="over the limit of 64"):
            client.infer("text", text_inputs(face, [[0]] * 65))
        for id in (10**6, -1):
            with pytest.raises(InferenceServerException, match=f"input_ids holds {id}; give whole") as caught:
                client.infer("text", text_inputs(face, [[0], [id]]))
            assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


@pytest.mark.parametrize("face", FACES, ids=["http", "grpc"])
def test_models_are_unloaded_loaded_and_changed_for_another_bundle(controlled: Server, face: Any):
    headers = {"authorization": f"Bearer {TOKEN}"}
    with face.InferenceServerClient(address(controlled, face)) as client:
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="token"):
            client.infer("text", text_inputs(face, [[1]]))
        with pytest.raises(InferenceServerException, match="token"):
            client.infer("text", text_inputs(face, [[1]]), headers={"authorization": f"Bearer {TOKEN}x"})

        def version() -> str:
            options = {"as_json": True} if face is over_grpc else {}
            return str(client.get_model_metadata("text", headers=headers, **options)["versions"][0])

        def row() -> list[float]:
            answer = client.infer("text", text_inputs(face, [[1]]), headers=headers)
            return [float(number) for number in answer.as_numpy("embedding")[0]]

        assert row() == [0, 1, 0]
        client.unload_model("text", headers=headers)
        assert not client.is_model_ready("text", headers=headers)
        with pytest.raises(InferenceServerException, match="unloaded; load it first"):
            row()
        for name in ("image", "embed_text", "embed_image"):
            client.unload_model(name, headers=headers)
        assert not client.is_server_ready(headers=headers)
        client.load_model("text", headers=headers)
        assert row() == [0, 1, 0]
        before = version()
        client.load_model("text", headers=headers, config='{"bundle": "turned"}')
        assert row() == [0, -1, 0]
        assert version() != before
        for outside in ("../colours", "/etc", "..", "missing"):
            with pytest.raises(InferenceServerException, match="unknown bundle"):
                client.load_model("text", headers=headers, config=f'{{"bundle": "{outside}"}}')
        assert row() == [0, -1, 0]


@pytest.mark.parametrize("face", FACES, ids=["http", "grpc"])
def test_a_server_that_was_not_told_so_loads_nothing(server: Server, face: Any):
    with face.InferenceServerClient(address(server, face)) as client:
        with pytest.raises(InferenceServerException, match="--control"):
            client.unload_model("text")
        assert client.is_model_ready("text")


def test_a_call_tells_its_id_and_the_bundle_in_its_trailing_metadata(server: Server):
    import grpc

    from edgeglm.serve.grpc_messages import message

    def trailing(method: str, data: bytes) -> tuple[Any, str, dict[str, Any]]:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        try:
            _, told = call.with_call(data, metadata=(("x-request-id", "abc-1"),), timeout=20)
            return told.code(), "", dict(told.trailing_metadata())
        except grpc.RpcError as error:
            failed: Any = error
            return failed.code(), failed.details(), dict(failed.trailing_metadata())

    request = message("ModelInferRequest")(model_name="nothing").SerializeToString()
    with grpc.insecure_channel(server.grpc) as channel:
        for method, data, code, words in (
            ("ServerMetadata", b"", "OK", ""),
            ("ModelInfer", request, "NOT_FOUND", "unknown model 'nothing'"),
            ("ModelInfer", b"\xff\xff", "INVALID_ARGUMENT", "no such message"),
        ):
            found, told, metadata = trailing(method, data)
            assert (found.name, words in told) == (code, True), told
            assert metadata["x-request-id"] == "abc-1"
            assert all(metadata[name] for name in IDENTITY)
            assert len(metadata["edgeglm-digest"]) == 64


def wait_until_held(server: Server) -> None:
    """Wait until the runner holds rows."""
    for _ in range(100):
        if asked_json(server, "GET", "/v1/stats")["runner"]["held"]:
            return
        time.sleep(0.05)
    raise AssertionError("the runner holds nothing")


def test_messages_that_are_too_large_are_refused_over_grpc_too(bundles: Path, tmp_path: Path):
    # a second for a call of one row; the most bytes of a message, and of all that are held
    command = ["tests.serve.faults_server", str(bundles / "colours"), "8", "1.0", "100000", "100000"]
    with (
        running(tmp_path / "log", command) as small,
        over_grpc.InferenceServerClient(small.grpc) as client,
    ):
        texts = over_grpc.InferInput("text", [1], "BYTES")
        for size, way in ((200_000, None), (200_000, "gzip")):
            texts.set_data_from_numpy(np.array([b"a" * size], dtype=object))
            with pytest.raises(InferenceServerException, match="larger than max"):
                client.infer("embed_text", [texts], compression_algorithm=way)
        answers: queue.Queue[Any] = queue.Queue()
        large = raw_input(over_grpc, "text", [b"a" * 12_000] * 5)
        client.async_infer("embed_text", [large], callback=lambda **told: answers.put(told["error"]))
        wait_until_held(small)
        with pytest.raises(InferenceServerException, match="as many bytes of requests as it may"):
            client.infer("embed_text", [large])
        inflated = gzip.compress(json.dumps({"inputs": [{**TEXT, "data": ["a" * 61_000]}]}).encode())
        status, error = refused(small, "/v2/models/embed_text/infer", inflated, {"Content-Encoding": "gzip"})
        assert (status, "as many bytes of requests as it may" in error) == (429, True)
        assert shed(small) == {"bytes": 2}
        assert answers.get(timeout=20) is None
        answer = client.infer("embed_text", [raw_input(over_grpc, "text", [b"red"])])  # nothing stays booked
        np.testing.assert_array_equal(answer.as_numpy("embedding"), [[1, 0, 0]])


def test_the_asyncio_client_streams_and_the_http_client_speaks_tls(
    server: Server, bundles: Path, tmp_path: Path
):
    async def streamed() -> list[str]:
        async def requests() -> Any:
            for word in (2, 0, 1):
                yield {
                    "model_name": "text",
                    "inputs": text_inputs(over_grpc_aio, [[word]]),
                    "request_id": str(word),
                }

        async with over_grpc_aio.InferenceServerClient(server.grpc) as client:
            return [
                found.get_response().id async for found, error in client.stream_infer(requests()) if not error
            ]

    assert asyncio.run(streamed()) == ["2", "0", "1"]
    certificate, key = self_signed(tmp_path)
    options = ("--tls-certificate", str(certificate), "--tls-key", str(key), "--no-grpc")
    with running(tmp_path / "log", serve_command(bundles / "colours", *options)) as secure:
        trusted = {"ca_certs": str(certificate)}
        with over_http.InferenceServerClient(secure.address, ssl=True, ssl_options=trusted) as client:
            answer = client.infer("text", text_inputs(over_http, [[1]]))
            np.testing.assert_array_equal(answer.as_numpy("embedding"), [[0, 1, 0]])


def test_the_messages_are_the_protocols_own():
    from google.protobuf import descriptor_pb2
    from tritonclient.grpc import model_config_pb2, service_pb2

    from edgeglm.serve.grpc_messages import message, service_descriptor

    def fields(descriptor: Any) -> dict[str, tuple[Any, ...]]:
        proto = descriptor_pb2.DescriptorProto()
        descriptor.CopyToProto(proto)
        found = {}
        for kind in (proto, *proto.nested_type):
            for field in kind.field:
                found[f"{kind.name}.{field.name}"] = (field.number, field.label, field.type, field.type_name)
        return found

    theirs = {
        **service_pb2.DESCRIPTOR.message_types_by_name,
        **model_config_pb2.DESCRIPTOR.message_types_by_name,
    }
    ours = message("ModelInferRequest").DESCRIPTOR.file.message_types_by_name
    for name, descriptor in ours.items():
        known = fields(theirs[name])
        assert {key: known[key] for key in fields(descriptor)} == fields(descriptor), name
    methods = {
        (method.name, method.input_type.full_name, method.output_type.full_name)
        for method in service_descriptor().methods
    }
    assert methods <= {
        (method.name, method.input_type.full_name, method.output_type.full_name)
        for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    }
