"""Inference requests that come whole: found in some bytes with httptools' parser, and once for the same head.

A client that asks again sends the same head, byte for byte. What a head says is therefore kept, and a request
with a known one is taken apart at its end.
"""

from __future__ import annotations

import httptools

_BEGINS = b"POST /v2/models/"
_MOST = 1 << 16  # bytes of a request that may take the short way
_KEPT_BYTES = 2048  # of a head that is kept
_KEPT = 256  # heads; then all are forgotten
_UNUSUAL = frozenset({b"expect", b"upgrade", b"transfer-encoding", b"connection"})


class Head:
    """What the head of a request says.

    Attributes:
        path: What is asked for.
        headers: By name in lower case.
        length: Bytes of the body.
        admitted: Whether its caller was found to be allowed; for the owner to note.
    """

    __slots__ = ("admitted", "headers", "length", "path")

    def __init__(self, path: str, headers: dict[bytes, bytes], length: int) -> None:
        self.path, self.headers, self.length = path, headers, length
        self.admitted = False


class Heads:
    """Finds whole requests. One for all connections of a server."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def whole_request(self, data: bytes) -> tuple[Head, bytes] | None:
        """Return head and body of bytes that are one whole and usual inference request, else None."""
        if not data.startswith(_BEGINS) or len(data) > _MOST:
            return None
        end = data.find(b"\r\n\r\n") + 4
        head = self._known.get(data[:end])
        if head is None:
            head = _parsed(data)
            if head is None:
                return None
            if end <= _KEPT_BYTES:
                if len(self._known) >= _KEPT:
                    self._known.clear()
                self._known[data[:end]] = head
        elif len(data) - end != head.length:
            return None
        return head, data[end:]


class _Found:
    """What the parser finds."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.length = 0
        self.complete = self.unusual = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if (name in _UNUSUAL and value.lower() != b"keep-alive") or name in self.headers:
            self.unusual = True
        self.headers[name] = value

    def on_body(self, body: bytes) -> None:
        self.length += len(body)

    def on_message_begin(self) -> None:
        """Note that a second request follows."""
        if self.complete:
            self.unusual = True

    def on_message_complete(self) -> None:
        self.complete = True


def _parsed(data: bytes) -> Head | None:
    found = _Found()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    if not found.complete or found.unusual or parser.get_http_version() != "1.1":
        return None
    plain = found.url.endswith(b"/infer") and b"%" not in found.url and b"?" not in found.url
    if not plain or b"host" not in found.headers or len(data) - data.find(b"\r\n\r\n") - 4 != found.length:
        return None
    return Head(found.url.decode("ascii", "replace"), found.headers, found.length)
