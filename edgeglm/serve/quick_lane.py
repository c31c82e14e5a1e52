"""A short way for inference requests through uvicorn.

ASGI's messages, header lists and events cost about 40 us a request here, two thirds of what the whole server
may cost. An inference request that arrives whole, which is how clients send small ones, is therefore read
and answered at the transport; all else, and whatever looks unusual, takes uvicorn's own way. Both ways
read HTTP with httptools' parser, and share one gate.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edgeglm.core.errors import UserError
from edgeglm.serve.guard import Gate, refused_answer
from edgeglm.serve.identity import Identity
from edgeglm.serve.v2_infer import inferred

_BEGINS = b"POST /v2/models/"
_MOST = 1 << 16  # bytes of a request that may take the short way
_REASONS = {
    200: b"200 OK", 400: b"400 Bad Request", 401: b"401 Unauthorized", 403: b"403 Forbidden",
    404: b"404 Not Found", 413: b"413 Content Too Large", 429: b"429 Too Many Requests",
    500: b"500 Internal Server Error", 503: b"503 Service Unavailable", 504: b"504 Gateway Timeout",
}  # fmt: skip
_UNUSUAL = frozenset({b"expect", b"upgrade", b"transfer-encoding", b"connection"})


class WholeRequest:
    """What httptools' parser finds in some bytes, if they are one whole request."""

    __slots__ = ("body", "complete", "headers", "unusual", "url")

    def __init__(self) -> None:
        self.url = self.body = b""
        self.headers: dict[bytes, bytes] = {}
        self.complete = self.unusual = False

    def on_url(self, url: bytes) -> None:
        """Take the target."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        name = name.lower()
        if (name in _UNUSUAL and value.lower() != b"keep-alive") or name in self.headers:
            self.unusual = True
        self.headers[name] = value

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self.body += body

    def on_message_begin(self) -> None:
        """Note that a second request follows."""
        if self.complete:
            self.unusual = True

    def on_message_complete(self) -> None:
        """Note the end."""
        self.complete = True


def whole_request(data: bytes) -> WholeRequest | None:
    """Parse bytes that are one whole inference request and nothing unusual; None for anything else."""
    found = WholeRequest()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(data)
    except httptools.HttpParserError:
        return None
    except httptools.HttpParserUpgrade:
        return None
    if not found.complete or found.unusual or parser.get_http_version() != "1.1":
        return None
    plain = found.url.endswith(b"/infer") and b"%" not in found.url and b"?" not in found.url
    return found if plain and b"host" in found.headers else None


def quick_lane(gate: Gate) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with the short way."""

    class QuickLane(HttpToolsProtocol):
        """One connection."""

        _task: asyncio.Task[None] | None = None
        _later = b""
        _between = True  # whether uvicorn's parser is between two messages
        _closing = False
        _waiting = False  # whether what comes is left unread until an answer is read
        _head_timer: asyncio.TimerHandle | None = None
        _unread_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Give a connection that says nothing the time of an idle one, which uvicorn does not."""
            super().connection_made(transport)
            gate.connections = self.connections
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

        def data_received(self, data: bytes) -> None:
            """Take the short way if it is open, else uvicorn's."""
            if self._task is not None:
                self._later += data
                self.flow.pause_reading()
                return
            if (
                self._between
                and len(data) <= _MOST
                and data.startswith(_BEGINS)
                and self._idle()
                and not self.pipeline
                and (request := whole_request(data)) is not None
            ):
                self._unset_keepalive_if_required()
                self._task = self.loop.create_task(self._answer(request))
                self.tasks.add(self._task)
                return
            super().data_received(data)

        def _idle(self) -> bool:
            """Say whether uvicorn's own way is free; it has no cycle before the first request."""
            cycle: Any = self.cycle
            return cycle is None or bool(cycle.response_complete)

        def on_message_begin(self) -> None:
            self._between = False
            self._head_timer = self.loop.call_later(gate.config.body_timeout, self.transport.abort)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_ended()
            super().on_headers_complete()

        def _head_ended(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def on_message_complete(self) -> None:
            self._between = True
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._task is not None:
                self._task.cancel()  # nobody waits for this answer any more
            self._head_ended()
            self._read_on()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            """Give a caller who does not read its answers some time, and then up."""
            super().pause_writing()
            self._await_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            if not self.transport.is_closing():
                self._read_on()
                if self._waiting:
                    self._waiting = False
                    self._next()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():  # which waits for what is not yet read
                self._await_reader()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._await_reader()

        def shutdown(self) -> None:
            if self._task is None:
                super().shutdown()
                self._await_reader()
            else:
                self._closing = True

        def send_400_response(self, msg: str) -> None:
            """Tell what is no HTTP so like any other refusal."""
            id_, error = gate.id_for({}), UserError("this is no HTTP/1.1 request; send one")
            status, answer, given = refused_answer(error)
            gate.enter()
            scope = {"method": "other", "path": "", "client": self.client, "headers": ()}
            gate.leave(scope, id_, status, 0.0, error, reserved=0)
            self._closing = True
            self._write(status, answer, given, id_, gate.service.identity)

        def _await_reader(self) -> None:
            if self._unread_timer is None:
                self._unread_timer = self.loop.call_later(gate.config.send_timeout, self.transport.abort)

        def _read_on(self) -> None:
            if self._unread_timer is not None:
                self._unread_timer.cancel()
                self._unread_timer = None

        async def _answer(self, request: WholeRequest) -> None:
            began = time.perf_counter()
            path = request.url.decode("ascii", "replace")
            headers, id_ = request.headers, gate.id_for(request.headers)
            error: BaseException | None = None
            identity = gate.service.identity
            status, reserved = 200, 0
            gate.enter()
            try:
                gate.admit(path, headers)
                gate.check_size(len(request.body))
                gate.reserve(len(request.body))
                reserved = len(request.body)
                answer, given, identity = await inferred(gate.service, path, headers, request.body)
            except asyncio.CancelledError:
                status = 499
                raise
            except Exception as caught:
                error = caught
                status, answer, given = refused_answer(caught)
            finally:
                task, self._task = self._task, None
                self.tasks.discard(task)
                scope = {"method": "POST", "path": path, "client": self.client, "headers": headers.items()}
                gate.leave(scope, id_, status, time.perf_counter() - began, error, reserved=reserved)
            self._write(status, answer, given, id_, identity)

        def _write(
            self, status: int, answer: bytes, given: list[Any], id_: bytes, identity: Identity
        ) -> None:
            if self.transport.is_closing():
                return
            parts = [b"HTTP/1.1 ", _REASONS.get(status) or b"%d Error" % status, b"\r\n"]
            closing = self._closing
            for name, value in given:
                parts += (name, b": ", value, b"\r\n")
                closing = closing or name == b"connection"
            parts += (b"x-request-id: ", id_, b"\r\n", identity.lines)
            if closing:
                parts.append(b"connection: close\r\n")
            parts += (b"content-length: %d\r\n\r\n" % len(answer), answer)
            self.transport.write(b"".join(parts))
            if closing:
                self.transport.close()
                self._await_reader()
            elif self.flow.write_paused:
                self.flow.pause_reading()
                self._waiting = True
            else:
                self._next()

        def _next(self) -> None:
            self.on_response_complete()
            if self._later:
                data, self._later = self._later, b""
                self.data_received(data)

    return QuickLane
