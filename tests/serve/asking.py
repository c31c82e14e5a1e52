"""A caller of the HTTP face who may say anything, byte by byte where need be."""

from __future__ import annotations

import http.client
import json
import re
import socket
from contextlib import closing
from typing import Any

from tests.serve.conftest import Server

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
