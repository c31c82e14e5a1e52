"""A short way for inference requests through uvicorn.

ASGI's messages, header lists and events cost about 40 us a request here, two thirds of what the whole server
may cost. An inference request that arrives whole, which is how clients send small ones, is therefore read
and answered at the transport; all else, and whatever looks unusual, takes uvicorn's own way. Both ways
read HTTP with httptools' parser, and share one gate.

Requests that come in one turn of the loop begin together at its end. Were each put into the queue as it is
read, the engine's thread would wake at the first one, get the interpreter between two reads, and run batches
of a few.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edgeglm.core.errors import UserError
from edgeglm.serve.driven import Driven
from edgeglm.serve.guard import Gate, refused_answer
from edgeglm.serve.identity import Identity
from edgeglm.serve.v2_infer import Inferred, inferred
from edgeglm.serve.whole_requests import Head, Heads

_REASONS = {
    200: b"200 OK", 400: b"400 Bad Request", 401: b"401 Unauthorized", 403: b"403 Forbidden",
    404: b"404 Not Found", 413: b"413 Content Too Large",
    415: b"415 Unsupported Media Type", 429: b"429 Too Many Requests",
    500: b"500 Internal Server Error", 503: b"503 Service Unavailable", 504: b"504 Gateway Timeout",
}  # fmt: skip


_HEARD = 16  # connections over the limit whose request is read, since it may be about health


class Turn:
    """Requests that came in one turn of the loop."""

    def __init__(self) -> None:
        self._waiting: list[tuple[QuickLane, Head, bytes]] = []

    def add(self, lane: QuickLane, head: Head, body: bytes) -> None:
        """Let a request begin at the end of this turn."""
        if not self._waiting:
            lane.loop.call_soon(self._begin)
        self._waiting.append((lane, head, body))

    def _begin(self) -> None:
        waiting, self._waiting = self._waiting, []
        for lane, head, body in waiting:
            lane.begin(head, body)


class QuickLane(HttpToolsProtocol):
    """One connection. ``quick_lane`` makes the class of a server, which all its connections share."""

    gate: Gate
    heads: Heads
    turn: Turn

    _busy = False  # whether a request is on the short way
    _later = b""
    _between = True  # whether uvicorn's parser is between two messages
    _closing = False
    _waiting = False  # whether what comes is left unread until an answer is read
    _answered = 0.0  # when the short way was last used, in the loop's seconds
    _work: Driven[Inferred] | None = None
    _head: Head
    _id: bytes
    _began: float
    _identity: Identity
    _reserved: int
    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give a connection that says nothing the time of an idle one, which uvicorn does not."""
        super().connection_made(transport)
        self.gate.connections = self.connections
        self._call_when_idle(self.timeout_keep_alive)
        if len(self.connections) > self.gate.config.max_connections + _HEARD:
            self._refuse(self.gate.crowded())

    def data_received(self, data: bytes) -> None:
        """Take the short way if it is open, else uvicorn's."""
        if self._busy:
            self._later += data
            self.flow.pause_reading()
            return
        if self._between and not self.pipeline and self._idle():
            found = self.heads.whole_request(data)
            if found is not None:
                self._busy = True
                self.turn.add(self, *found)
                return
        super().data_received(data)

    def begin(self, head: Head, body: bytes) -> None:
        """Let a whole request in, and answer it or set it to work."""
        gate = self.gate
        self._began = time.perf_counter()
        self._head, self._id = head, gate.id_for(head.headers)
        self._identity, self._reserved = gate.service.identity, 0
        gate.enter()
        try:
            if not head.admitted:
                gate.check_caller(head.path, head.headers)
                head.admitted = True
            gate.check_load(head.path)
            gate.check_size(len(body))
            gate.service.budget.reserve(len(body))
        except Exception as error:
            self._ended(None, error)
            return
        self._reserved = len(body)
        work = Driven(inferred(gate.service, head.path, head.headers, body), self._ended)
        if work.waits:
            self._work = work
            if self.transport.is_closing():
                work.cancel()  # nobody waits for this answer any more

    def _ended(self, found: Inferred | None, error: BaseException | None) -> None:
        """Book the end of a request, and tell it."""
        self._busy, self._work = False, None
        if error is None and found is not None:
            answer, given, self._identity = found
            status = 200
        elif isinstance(error, Exception):
            status, answer, given = refused_answer(error)
        else:
            status, answer, given = 499, b"", []
        head, seconds = self._head, time.perf_counter() - self._began
        self.gate.leave("POST", head.path, status, seconds, reserved=self._reserved)
        if self.gate.talks or error is not None:
            self._tell("POST", head.path, head.headers.items(), status, seconds, error)
        if status != 499:
            self._write(status, answer, given)

    def _tell(
        self,
        method: str,
        path: str,
        headers: Iterable[tuple[bytes, bytes]],
        status: int,
        seconds: float,
        error: BaseException | None,
    ) -> None:
        scope = {"method": method, "path": path, "client": self.client, "headers": headers}
        self.gate.tell(scope, self._id, status, seconds, error if isinstance(error, Exception) else None)

    def _write(self, status: int, answer: bytes, given: list[tuple[bytes, bytes]]) -> None:
        if self.transport.is_closing():
            return
        parts = [b"HTTP/1.1 ", _REASONS.get(status) or b"%d Error" % status, b"\r\n"]
        closing = self._closing
        for name, value in given:
            parts += (name, b": ", value, b"\r\n")
            closing = closing or name == b"connection"
        parts += (b"x-request-id: ", self._id, b"\r\n", self._identity.lines)
        if closing:
            parts.append(b"connection: close\r\n")
        parts += (b"content-length: %d\r\n\r\n" % len(answer), answer)
        self.transport.write(b"".join(parts))
        if closing:
            self.transport.close()
            self._await_reader()
        elif self.flow.write_paused:
            self.flow.pause_reading()
            self._waiting = self._busy = True
        else:
            self._next()

    def _next(self) -> None:
        """Be ready for the next request, and take it if it is there. The timer of idleness runs on."""
        self.server_state.total_requests += 1
        self._answered = self.loop.time()
        self.flow.resume_reading()
        if self._later:
            data, self._later = self._later, b""
            self.data_received(data)

    def _idle(self) -> bool:
        """Say whether uvicorn's own way is free; it has no cycle before the first request."""
        cycle: Any = self.cycle
        return cycle is None or bool(cycle.response_complete)

    # What uvicorn calls, with time limits that it has not.

    def on_message_begin(self) -> None:
        """Give a head that never ends some time."""
        self._between = False
        self._head_timer = self.loop.call_later(self.gate.config.body_timeout, self.transport.abort)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note the end of a head."""
        self._head_ended()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note the end of a message."""
        self._between = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Give a connection that closes some time."""
        super().on_response_complete()
        if self.transport.is_closing():  # which waits for what is not yet read
            self._await_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        """Withdraw what is asked."""
        if self._work is not None:
            self._work.cancel()  # nobody waits for this answer any more
        self._head_ended()
        self._read_on()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give a caller who does not read its answers some time, and then up."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """Go on with a caller who reads again."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._read_on()
            if self._waiting:
                self._waiting = self._busy = False
                self._next()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle for so long."""
        quiet = self.loop.time() - self._answered
        if self._busy or quiet < self.timeout_keep_alive:
            self._call_when_idle(max(self.timeout_keep_alive - quiet, 1.0))
            return
        super().timeout_keep_alive_handler()
        self._await_reader()

    def shutdown(self) -> None:
        """Answer what was accepted, and close."""
        if self._busy and not self._waiting:
            self._closing = True
        else:
            super().shutdown()
            self._await_reader()

    def send_400_response(self, msg: str) -> None:
        """Tell what is no HTTP so like any other refusal."""
        self._refuse(UserError("this is no HTTP/1.1 request; send one"))

    def _refuse(self, error: Exception) -> None:
        """Answer what is no request of ours, or was not waited for, and close."""
        self._id, self._identity = self.gate.id_for({}), self.gate.service.identity
        status, answer, given = refused_answer(error)
        self.gate.enter()
        self.gate.leave("other", "", status, 0.0, reserved=0)
        self._tell("other", "", (), status, 0.0, error)
        self._closing = True
        self._write(status, answer, given)

    def _call_when_idle(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _head_ended(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_reader(self) -> None:
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self.gate.config.send_timeout, self.transport.abort)

    def _read_on(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None


def quick_lane(gate: Gate) -> type[QuickLane]:
    """Return uvicorn's protocol with the short way, for one server."""

    class ServersLane(QuickLane):
        """One connection of this server."""

    ServersLane.gate, ServersLane.heads, ServersLane.turn = gate, Heads(), Turn()
    return ServersLane
