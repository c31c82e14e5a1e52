"""What callers send that nobody should, and what the HTTP face answers."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import io
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts.fixtures.colours import COLOURS, picture
from tests.runtime.test_runner_bundle import bomb
from tests.serve.conftest import PLAN, TOKEN, Server, running, serve_command

TEXT = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["red"]}
IDENTITY = tuple(f"edgeglm-{what}" for what in ("version", "bundle", "digest", "target", "precision", "plan"))


def asked(
    server: Server, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    host, _, port = server.address.rpartition(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=20)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def asked_json(server: Server, method: str, path: str, value: object = None) -> Any:
    status, _, body = asked(server, method, path, json.dumps(value).encode() if value is not None else None)
    assert status == 200, body
    return json.loads(body)


def shed(server: Server) -> dict[str, int]:
    """What the server says that it refused because something was full."""
    text = asked(server, "GET", "/metrics")[2].decode()
    found = re.findall(r'^edgeglm_shed_total\{full="(\w+)"\} (\d+)', text, re.MULTILINE)
    return {full: int(count) for full, count in found if int(count)}


def refused(server: Server, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, str]:
    status, _, answer = asked(server, "POST", path, body, headers)
    return status, json.loads(answer)["error"]


def raw(server: Server, data: bytes, *, shut: bool = False, silence: float = 1.5) -> bytes:
    """Send bytes, and return all that comes until the server closes or is silent for a while."""
    host, _, port = server.address.rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=silence)) as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
                connection.settimeout(0.3)
        except TimeoutError:
            pass
        return found


def infer_bytes(server: Server, *, extra: bytes = b"", body: bytes | None = None) -> bytes:
    body = body if body is not None else json.dumps({"inputs": [TEXT]}).encode()
    head = f"POST /v2/models/embed_text/infer HTTP/1.1\r\nHost: {server.address}\r\n".encode()
    return head + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/v1/info", "/metrics", "/nothing", "/v1/stats"])
def test_every_answer_says_which_bundle_gave_it_and_carries_the_request_id(server: Server, path: str):
    _, headers, _ = asked(server, "GET", path, headers={"X-Request-Id": "abc-1"})
    assert all(headers[name] for name in IDENTITY)
    assert len(headers["edgeglm-digest"]) == 64
    assert headers["edgeglm-plan"] == hashlib.sha256(PLAN).hexdigest()
    assert headers["x-request-id"] == "abc-1"
    status, headers, _ = asked(server, "POST", "/v2/models/nothing/infer", b"{}")
    assert status == 404
    assert all(headers[name] for name in IDENTITY)
    event = server.logged(lambda event: event.get("id") == headers["x-request-id"])
    assert (event["status"], event["level"]) == (404, "warning")
    assert "unknown model" in event["error"]


def test_every_description_names_the_precision_plan(server: Server):
    plan = hashlib.sha256(PLAN).hexdigest()
    for path in ("/v2", "/v1/info", "/v1/stats", "/v1/search?q=red"):
        assert asked_json(server, "GET", path)["edgeglm"]["plan"] == plan
    assert f'plan="{plan}"' in asked(server, "GET", "/metrics")[2].decode()


def test_an_id_that_would_forge_a_log_line_is_replaced(server: Server):
    _, headers, _ = asked(server, "GET", "/v2", headers={"X-Request-Id": "a b"})
    assert headers["x-request-id"] != "a b"
    _, headers, _ = asked(server, "GET", "/v2", headers={"X-Request-Id": "x" * 129})
    assert len(headers["x-request-id"]) < 40


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no inference request"),
        (b"\xff\xfe", "no inference request"),
        (b'{"inputs": ', "no inference request"),
        (b'{"inputs": 3}', r"\$.inputs"),
        (b'{"inputs": [], "more": 1}', "unknown field `more`"),
        (b'{"inputs": []}', "no rows"),
        (b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES"}]}', "has no data"),
        (json.dumps({"inputs": [TEXT, TEXT]}).encode(), "twice"),
        (json.dumps({"inputs": [{**TEXT, "data": ["a", "b"]}]}).encode(), "must be 1 strings"),
        (json.dumps({"inputs": [{**TEXT, "data": [1]}]}).encode(), "must be 1 strings"),
        (json.dumps({"inputs": [{**TEXT, "shape": [-1]}]}).encode(), "shape"),
        (json.dumps({"inputs": [{**TEXT, "shape": [2**39, 2**39]}]}).encode(), "strings"),
        (json.dumps({"inputs": [{**TEXT, "datatype": "FP31"}]}).encode(), "did you mean"),
        (json.dumps({"inputs": [{**TEXT, "data": ["  "]}]}).encode(), "a text is empty"),
        (b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["\\ud800"]}]}', ""),
        (b'{"inputs": ' + b"[" * 100_000, "no inference request"),
        (
            b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["\xff"]}]}',
            "is no JSON",
        ),
    ],
)
def test_bodies_that_are_no_request_are_told_what_is_wrong(server: Server, body: bytes, words: str):
    status, error = refused(server, "/v2/models/embed_text/infer", body)
    assert status == 400
    assert re.search(words, error), error


@pytest.mark.parametrize(
    ("length", "size", "data", "words"),
    [
        ("9999", 16, b"\0" * 16, "Inference-Header-Content-Length"),
        ("-1", 16, b"\0" * 16, "no number"),
        ("x", 16, b"\0" * 16, "no number"),
        (None, 16, b"\0" * 8, "should have 16 bytes and 8 are left"),
        (None, 16, b"\0" * 24, "8 bytes follow the last tensor"),
        (None, 12, b"\0" * 12, "takes 16"),
    ],
)
def test_binary_tensors_that_are_cut_or_too_long_are_told(server: Server, length, size, data, words):
    inputs = [
        {"name": n, "shape": [1, 2], "datatype": "INT64", "parameters": {"binary_data_size": size}}
        for n in ("input_ids",)
    ]
    head = json.dumps({"inputs": inputs}).encode()
    headers = {"Inference-Header-Content-Length": length or str(len(head))}
    status, error = refused(server, "/v2/models/text/infer", head + data, headers)
    assert status == 400
    assert words in error


def test_pictures_that_are_bombs_or_odd_are_refused_or_decoded(server: Server):
    def embedded(data: bytes) -> list[float]:
        body = {"image": base64.b64encode(data).decode()}
        return [round(x, 2) for x in asked_json(server, "POST", "/v1/embed", body)["embeddings"][0]]

    status, error = refused(server, "/v1/embed", bomb(), {"Content-Type": "image/png"})
    assert (status, "more than 100000000" in error) == (400, True)
    for bad in (b"", b"GIF89a", picture(COLOURS["red"])[:40]):
        assert refused(server, "/v1/embed", bad, {"Content-Type": "image/png"})[0] == 400
    assert refused(server, "/v1/embed", b'{"image": "no base64!"}')[0] == 400

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    red = Image.new("RGB", (6, 6), (255, 0, 0))
    green = Image.new("RGB", (6, 6), (0, 255, 0))
    assert embedded(saved(red, "GIF", save_all=True, append_images=[green])) == [1, 0, 0]
    assert embedded(saved(red.convert("CMYK"), "TIFF")) == [1, 0, 0]
    grey = Image.frombytes("I;16", (6, 6), struct.pack("<36H", *[65535] * 36))
    assert embedded(saved(grey, "PNG")) == [1, 1, 1]


def test_words_and_pictures_embed_and_search_in_every_plain_way(server: Server):
    found = asked_json(server, "GET", "/v1/search?q=red&k=2")
    assert found["hits"][0]["id"] == "set/red"
    assert found["hits"][0]["score"] == pytest.approx(1)
    assert found["searched"] == {"name": "gallery", "rows": 3, "filters": False}
    assert found["edgeglm"]["precision"] == "fp32"
    status, headers, body = asked(server, "GET", found["hits"][0]["picture"])
    assert (status, headers["content-type"]) == (200, "image/png")
    assert body == picture(COLOURS["red"])
    blue = picture(COLOURS["blue"])
    for content, kind in (
        (blue, "image/png"),
        (json.dumps({"image": base64.b64encode(blue).decode(), "k": 1}).encode(), "application/json"),
        (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
            + blue
            + b"\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
    ):
        status, _, answer = asked(server, "POST", "/v1/search", content, {"Content-Type": kind})
        assert status == 200, answer
        assert json.loads(answer)["hits"][0]["id"] == "set/blue"
    both = asked_json(
        server, "POST", "/v1/embed", {"texts": ["red", "blue"], "image": base64.b64encode(blue).decode()}
    )
    assert [[round(x) for x in row] for row in both["embeddings"]] == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/search", 400),
        ("/v1/search?q=red&k=0", 400),
        ("/v1/search?q=red&k=many", 400),
        ("/v1/search?q=red&where=3", 400),
        ("/v1/search?q=red&where=%7B%22a%22%3A1%7D", 400),
        ("/v1/search?q=", 400),
        ("/v1/search?q=%ff", 400),
        ("/v1/search?q=red&where=%ed%a0%80", 400),
        ("/v1/search?q=" + "a" * 50_000, 413),
        ("/v1/pictures/set/red", 200),
        ("/v1/pictures/../../manifest.json", 404),
        ("/v1/pictures/%2e%2e/%2e%2e/manifest.json", 404),
        ("/v1/pictures//etc/passwd", 404),
        ("/v2/models/..%2f..%2fetc", 404),
        ("/v2/models/text/versions/..", 404),
        ("/v2/models/%00", 404),
        ("/v2/repository/index", 405),
    ],
)
def test_paths_lead_nowhere_but_to_what_is_served(server: Server, path: str, status: int):
    found, headers, body = asked(server, "GET", path)
    assert found == status, body
    if status == 200:
        assert headers["x-content-type-options"] == "nosniff"
    else:
        assert json.loads(body)["error"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v2/repository/index", "POST"),
        ("GET", "/v2/models/text/infer", "POST"),
        ("PUT", "/v1/search", "GET or HEAD or POST"),
        ("DELETE", "/v2/models/text", "GET or HEAD"),
        ("POST", "/metrics", "GET or HEAD"),
    ],
)
def test_a_wrong_method_is_told_which_ones_the_path_takes(server: Server, method, path, allowed):
    status, headers, body = asked(server, method, path)
    assert status == 405
    assert sorted(headers["allow"].split(", ")) == allowed.split(" or ")
    assert json.loads(body) == {"error": f"this path does not take that method; use {allowed}"}


def form(*parts: bytes) -> bytes:
    return b"".join(b"--x\r\nContent-Disposition: " + part + b"\r\n" for part in parts) + b"--x--\r\n"


_KIND = "multipart/form-data; boundary=x"
_TEXT_FIELD = b'form-data; name="text"\r\n\r\n'
_FILE_FIELD = b'form-data; name="image"; filename="a"\r\n\r\n'


@pytest.mark.parametrize("path", ["/v1/search", "/v1/embed"])
@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("multipart/form-data", form(_TEXT_FIELD + b"red"), 400, "names no boundary; let the client"),
        (_KIND, form(_TEXT_FIELD + b"a" * 1_100_000), 413, "over 1048576 bytes; send files as 'image'"),
        (_KIND, form(*[_TEXT_FIELD + b"a"] * 65), 413, "over 64 files or text fields; send several"),
        (_KIND, form(*[_FILE_FIELD + b"a"] * 65), 413, "over 64 files or text fields; send several"),
        (_KIND, form(b"form-data\r\n\r\nred"), 400, "has no name; call it"),
        (_KIND, b"no form at all", 400, "no multipart form; send one as"),
        (_KIND, form(b'form-data; name="image"\r\n\r\nred'), 400, "send files as 'image'"),
        (_KIND, form(b'form-data; name="odd"\r\n\r\nred'), 400, ";"),
    ],
)
def test_forms_that_are_none_or_too_large_are_told_what_to_do(server, path, kind, body, status, words):
    found, error = refused(server, path, body, {"Content-Type": kind})
    assert found == status
    assert words in error


def test_a_text_that_would_hold_up_others_is_refused_at_once(server: Server):
    long = {**TEXT, "data": ["a " * 1_000_000]}
    body = json.dumps({"inputs": [long], "parameters": {"timeout": 100_000}}).encode()
    began = time.monotonic()
    status, error = refused(server, "/v2/models/embed_text/infer", body)
    assert (status, "over the limit of 40960" in error) == (413, True)
    assert time.monotonic() - began < 1
    assert refused(server, "/v1/embed", json.dumps({"texts": ["red", "a" * 50_000]}).encode())[0] == 413


def test_pages_of_other_sites_may_not_ask(server: Server):
    assert asked(server, "GET", "/v2", headers={"Host": "evil.example"})[0] == 403
    assert asked(server, "GET", "/v2", headers={"Origin": "http://evil.example"})[0] == 403
    assert asked(server, "GET", "/v2", headers={"Origin": server.http})[0] == 200
    for odd in ("http://[", "http://a]b", "null", "\xff", ""):
        head = f"GET /v2 HTTP/1.1\r\nHost: {server.address}\r\nOrigin: {odd}\r\n\r\n".encode("latin-1")
        assert raw(server, head).startswith(b"HTTP/1.1 403 "), odd
        answer = raw(server, infer_bytes(server, extra=f"Origin: {odd}\r\n".encode("latin-1")))
        assert answer.startswith(b"HTTP/1.1 403 "), odd
    body = json.dumps({"inputs": [TEXT]}).encode()
    host = {"Host": "evil.example"}
    assert asked(server, "POST", "/v2/models/embed_text/infer", body, host)[0] == 403


@pytest.mark.parametrize("way", ["GZIP", "Deflate", " gzip "])
def test_names_of_encodings_are_read_in_any_case(server: Server, way: str):
    body = json.dumps({"inputs": [TEXT]}).encode()
    packed = gzip.compress(body) if "gzip" in way.lower() else zlib.compress(body)
    headers = {"Content-Encoding": way}
    assert asked(server, "POST", "/v2/models/embed_text/infer", packed, headers)[0] == 200


def test_an_encoding_that_is_not_known_is_told_with_those_that_are(server: Server):
    status, headers, body = asked(
        server, "POST", "/v2/models/embed_text/infer", b"{}", {"Content-Encoding": "br"}
    )
    assert (status, headers["accept-encoding"]) == (415, "gzip, deflate")
    assert "use gzip or deflate" in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("accepted", "way"),
    [
        ("gzip", "gzip"), ("GZip;q=0.5", "gzip"), ("deflate, gzip;q=0", "deflate"), ("gzip; q=0.000", None),
        ("gzip;q=0, deflate;q=0", None), ("br", None), ("identity", None), ("gzip;q=0.01", "gzip"),
    ],
)  # fmt: skip
def test_an_answer_is_compressed_only_as_the_caller_wants_it(server: Server, accepted, way):
    body = json.dumps({"id": "x" * 2000, "inputs": [TEXT]}).encode()
    headers = {"Accept-Encoding": accepted}
    status, found, answer = asked(server, "POST", "/v2/models/embed_text/infer", body, headers)
    assert (status, found.get("content-encoding")) == (200, way)
    unpacked: dict[str | None, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress,
        "deflate": zlib.decompress,
    }
    plain = unpacked.get(way, bytes)(answer)
    assert json.loads(plain)["outputs"][0]["shape"] == [1, 3]


def test_a_missing_or_wrong_token_lets_nobody_in_but_health(bundles: Path, tmp_path: Path):
    with running(tmp_path / "log", serve_command(bundles / "colours"), EDGEGLM_TOKEN=TOKEN) as server:
        body = json.dumps({"inputs": [TEXT]}).encode()
        for header in (None, "Bearer", "Bearer ", f"Bearer {TOKEN}x", TOKEN, f"Basic {TOKEN}"):
            headers = {"Authorization": header} if header else {}
            for method, path, content in (
                ("GET", "/v2", None),
                ("GET", "/metrics", None),
                ("GET", "/v2/health/../../metrics", None),
                ("POST", "/v2/models/embed_text/infer", body),
            ):
                status, answer, _ = asked(server, method, path, content, headers)
                assert (status, answer["www-authenticate"]) == (401, 'Bearer realm="edgeglm"')
        assert asked(server, "GET", "/v2/health/ready")[0] == 200
        good = {"Authorization": f"Bearer {TOKEN}"}
        assert asked(server, "POST", "/v2/models/embed_text/infer", body, good)[0] == 200
        assert TOKEN not in server.log.read_text()


def test_metrics_count_batches_answers_and_refusals(server: Server):
    asked(server, "POST", "/v2/models/embed_text/infer", json.dumps({"inputs": [TEXT]}).encode())
    text = asked(server, "GET", "/metrics")[2].decode()
    for line in (
        r'edgeglm_bundle_info{.*digest="[0-9a-f]{64}".*} 1.0',
        r'edgeglm_requests_total{method="POST",route="/v2/models/infer",status="200"} \d',
        r'edgeglm_batch_size_bucket{le="1",tower="text"} \d',
        r'edgeglm_request_seconds_count{face="http",route="/v2/models/infer"} \d',
        r"edgeglm_queue_depth 0.0",
        r'edgeglm_shed_total{full="queue"} 0.0',
        r'edgeglm_shed_total{full="connections"} 0.0',
        r"edgeglm_deadline_missed_total \d",
        r'edgeglm_stage_seconds_count{stage="engine",tower="text"} \d',
    ):
        assert re.search(line, text), line


def test_requests_in_pieces_in_a_row_and_in_chunks_are_all_answered(server: Server):
    request = infer_bytes(server)
    host, _, port = server.address.rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=5)) as connection:
        for byte in range(0, len(request), 7):
            connection.sendall(request[byte : byte + 7])
            time.sleep(0.001)
        found = b""
        while b'"outputs"' not in found:
            found += connection.recv(65536)
        assert found.startswith(b"HTTP/1.1 200 OK")
        connection.sendall(request * 3 + request[:50])
        found = b""
        while found.count(b'"outputs"') < 3:
            found += connection.recv(65536)
        connection.sendall(request[50:])
        while found.count(b'"outputs"') < 4:
            found += connection.recv(65536)
        assert found.count(b"HTTP/1.1 200 OK") == 4
    body = json.dumps({"inputs": [TEXT]}).encode()
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    head = f"POST /v2/models/embed_text/infer HTTP/1.1\r\nHost: {server.address}\r\n"
    answer = raw(server, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    closes = raw(server, infer_bytes(server, extra=b"Connection: close\r\n"))
    assert closes.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"POST /v2/models/text/infer HTTP/9.9\r\n\r\n",
        b"POST /v2/models/text/infer HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"POST /v2/models/text/infer HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v2/models/text/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
    ],
)
def test_what_is_not_http_is_refused_and_the_server_lives(server: Server, data: bytes):
    answer = raw(server, data)
    assert answer == b"" or answer.split()[1] in (b"400", b"403", b"404", b"413", b"405", b"431"), answer[
        :200
    ]
    if answer.startswith(b"HTTP/1.1 400"):
        head, _, told = answer.partition(b"\r\n\r\n")
        assert all(f"\r\n{name}: ".encode() in head for name in (*IDENTITY, "x-request-id"))
        assert json.loads(told)["error"]
    assert asked(server, "GET", "/v2/health/ready")[0] == 200
