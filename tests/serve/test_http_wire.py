"""If these fail, somebody gets in who should not, or bytes that are no request bring the server down."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.serve.asking import IDENTITY, TEXT, asked, infer_bytes, raw
from tests.serve.conftest import TOKEN, Server, running, serve_command


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
