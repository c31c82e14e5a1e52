"""Spans, as a collector gets them."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.asking import TEXT, asked
from tests.serve.conftest import running, serve_command


@pytest.fixture
def collected() -> Iterator[tuple[str, list[bytes]]]:
    bodies: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


def test_a_request_becomes_a_span_under_the_callers_own(collected, bundles: Path, tmp_path: Path):
    endpoint, bodies = collected
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "x-request-id": "span-1"}
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_COMPRESSION": "none"}
    command = serve_command(bundles / "colours", "--traces")
    with running(tmp_path / "log", command, **environment) as server:
        body = json.dumps({"inputs": [TEXT]}).encode()
        assert asked(server, "POST", "/v2/models/embed_text/infer", body, headers)[0] == 200
        digest = asked(server, "GET", "/v2", None, headers)[1]["edgeglm-digest"]
    sent = b"".join(bodies)
    assert sent.count(bytes.fromhex(trace)) == 2
    for words in (b"POST /v2/models/infer", b"GET /v2", b"span-1", digest.encode()):
        assert words in sent
