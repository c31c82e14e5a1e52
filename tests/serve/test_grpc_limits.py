"""What callers over gRPC may hold: places, streams and connections, and when the server takes them back."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc

from edgeglm.serve.grpc_messages import message
from tests.serve.asking import IDENTITY, asked, shed
from tests.serve.conftest import Server, running

LONG, SHORT = "75", "1"  # seconds that a caller may be silent


@contextmanager
def served(bundles: Path, tmp_path: Path, *, idle: str, seconds: str = "0.0") -> Iterator[Server]:
    """A server of two calls at a time."""
    command = [
        "tests.serve.faults_server", str(bundles / "colours"), "64", seconds, "100000", "20000000", "2", idle,
    ]  # fmt: skip
    with running(tmp_path / "log", command) as server:
        yield server


class Stream:
    """A stream that is open, and says only what it is told to."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._more, self._closed = threading.Event(), False
        self._requests: list[Any] = []
        call = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            lambda request: request.SerializeToString(),
            message("ModelStreamInferResponse").FromString,
        )
        self.answers: Any = call(self._sent(), timeout=60)

    def _sent(self) -> Iterator[Any]:
        while not self._closed:
            while self._requests:
                yield self._requests.pop(0)
            self._more.wait()
            self._more.clear()

    def ask(self, id: str) -> None:
        request = message("ModelInferRequest")(model_name="embed_text", id=id)
        tensor = request.inputs.add(name="text", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(b"red")
        self._requests.append(request)
        self._more.set()

    def end(self) -> tuple[str, str, dict[str, Any]]:
        """Wait for the stream's end; return its status, its words and its trailers."""
        try:
            for _ in self.answers:
                pass
        except grpc.RpcError:
            pass
        code = self.answers.code().name, str(self.answers.details())
        return *code, dict(self.answers.trailing_metadata() or ())

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.answers.cancel()
        self._closed = True
        self._more.set()


def called(channel: grpc.Channel, method: str) -> tuple[str, dict[str, Any]]:
    call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
    try:
        _, told = call.with_call(b"", timeout=20)
        return told.code().name, dict(told.trailing_metadata())
    except grpc.RpcError as error:
        failed: Any = error
        return failed.code().name, dict(failed.trailing_metadata())


def streams(channel: grpc.Channel, stack: ExitStack, count: int) -> list[Stream]:
    """Streams that hold a place each: one answer of each has come."""
    found = [stack.enter_context(Stream(channel)) for _ in range(count)]
    for stream in found:
        stream.ask("first")
        assert next(stream.answers).infer_response.id == "first"
    return found


def test_a_full_face_refuses_with_a_time_and_a_count_and_answers_about_health(bundles, tmp_path):
    with (
        served(bundles, tmp_path, idle=LONG) as server,
        grpc.insecure_channel(server.grpc) as channel,
        ExitStack() as stack,
    ):
        streams(channel, stack, 2)
        code, trailers = called(channel, "ServerMetadata")
        assert code == "RESOURCE_EXHAUSTED"
        assert (trailers["retry-after"], trailers["grpc-retry-pushback-ms"]) == ("1", "1000")
        assert all(trailers[name] for name in (*IDENTITY, "x-request-id"))
        assert [called(channel, name)[0] for name in ("ServerLive", "ServerReady")] == ["OK", "OK"]
        text = asked(server, "GET", "/metrics")[2].decode()
        counted = (
            r'edgeglm_requests_total\{method="grpc",route="ServerMetadata",status="RESOURCE_EXHAUSTED"\} 1'
        )
        assert re.search(counted, text)
        assert shed(server) == {"calls": 1}
        stack.close()
        assert becomes(lambda: called(channel, "ServerMetadata")[0], "OK")


def becomes(asked: Any, wanted: Any, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if asked() == wanted:
            return True
        time.sleep(0.05)
    return False


def test_streams_that_say_nothing_are_ended_and_give_their_places_back(bundles: Path, tmp_path: Path):
    with (
        served(bundles, tmp_path, idle=SHORT) as server,
        grpc.insecure_channel(server.grpc) as channel,
        ExitStack() as stack,
    ):
        for stream in [stack.enter_context(Stream(channel)) for _ in range(2)]:
            code, words, trailers = stream.end()
            assert (code, words) == (
                "CANCELLED",
                "nothing came over this stream for 1 s; open it again to ask",
            )
            assert trailers["edgeglm-digest"]
        assert called(channel, "ServerMetadata")[0] == "OK"


def test_a_stream_whose_answer_takes_longer_than_silence_may_is_not_silent(bundles: Path, tmp_path: Path):
    with (
        served(bundles, tmp_path, idle=SHORT, seconds="1.5") as server,
        grpc.insecure_channel(server.grpc) as channel,
        Stream(channel) as stream,
    ):
        stream.ask("slow")
        assert next(stream.answers).infer_response.id == "slow"


def test_a_stream_that_nobody_reads_is_cut_and_gives_its_place_back(bundles: Path, tmp_path: Path):
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with (
        served(bundles, tmp_path, idle=LONG) as server,
        grpc.insecure_channel(server.grpc, options) as channel,
        grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)]) as other,
        ExitStack() as stack,
    ):
        for stream in streams(channel, stack, 2):
            for number in range(64):  # 60 kB of an id come back with each
                stream.ask(f"{number}-" + "x" * 60_000)
        assert called(other, "ServerMetadata")[0] == "RESOURCE_EXHAUSTED"
        assert becomes(lambda: called(other, "ServerMetadata")[0], "OK")


def test_sigterm_answers_what_a_stream_has_asked_and_ends_it(bundles: Path, tmp_path: Path):
    with (
        served(bundles, tmp_path, idle=LONG, seconds="1.0") as server,
        grpc.insecure_channel(server.grpc) as channel,
        Stream(channel) as silent,
        Stream(channel) as asking,
    ):
        asking.ask("accepted")
        assert becomes(lambda: b"edgeglm_held 1.0" in asked(server, "GET", "/metrics")[2], True)
        began = time.monotonic()
        server.process.terminate()
        assert next(asking.answers).infer_response.id == "accepted"
        for stream in (silent, asking):
            code, words, trailers = stream.end()
            assert (code, "the server stops" in words) == ("UNAVAILABLE", True)
            assert trailers["retry-after"] == "5"
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 15  # and not the 30 seconds of a drain


def test_a_connection_without_calls_is_closed(bundles: Path, tmp_path: Path):
    with served(bundles, tmp_path, idle=SHORT) as server, grpc.insecure_channel(server.grpc) as channel:
        states: list[str] = []
        channel.subscribe(lambda state: states.append(state.name))
        assert called(channel, "ServerLive")[0] == "OK"
        assert becomes(lambda: states[-1], "IDLE")
        assert "READY" in states
