"""The outermost layer of the HTTP face: who may ask, how much, how long; ids, headers, logs, counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sized
from typing import Any

import msgspec

from edgeglm.runtime.requests import OverloadedError
from edgeglm.serve.callers import Callers
from edgeglm.serve.hosts import Hosts
from edgeglm.serve.identity import Identity
from edgeglm.serve.logs import Log
from edgeglm.serve.metrics import HttpCounts, route_of
from edgeglm.serve.refusals import (
    CrowdedError,
    ForbiddenError,
    GoneError,
    SlowCallerError,
    TooLargeError,
    UnauthorizedError,
    UnknownEncodingError,
    refusal_of,
    words_of,
)
from edgeglm.serve.service import Service
from edgeglm.serve.traces import Traces

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
_JSON = (b"content-type", b"application/json")
_ANSWERED_BY = "edgeglm.answered_by"


class Gate:
    """The rules and the books that all ways into the HTTP face share.

    Args:
        service: The bundle in service.
        log: Where requests are logged.
        counts: Where they are counted.
        open_paths: Paths that need no token, besides health; one that ends in ``/`` stands for all below.
        traces: Where spans go; None for nowhere.
    """

    def __init__(
        self,
        service: Service,
        log: Log,
        counts: HttpCounts,
        *,
        open_paths: tuple[str, ...] = (),
        traces: Traces | None = None,
    ) -> None:
        self._traces = traces
        self.service, self.config = service, service.config
        self._log, self._counts = log, counts
        self._open = OPEN_PATHS | {path for path in open_paths if not path.endswith("/") or path == "/"}
        self._open_below = tuple(path for path in open_paths if path.endswith("/") and path != "/")
        self._callers = Callers(self.config.token)
        self._hosts = Hosts(self.config)
        self._active = 0
        self.talks = self.config.access_log or traces is not None
        """Whether requests that went well are told."""
        self.connections: Sized = ()
        """The open connections, once the transport has told."""

    def enter(self) -> None:
        """Count a request as worked on; ``leave`` ends it."""
        self._active += 1

    def leave(self, method: str, path: str, status: int, seconds: float, *, reserved: int) -> None:
        """Book and count the end of a request; ``tell`` logs it."""
        self._active -= 1
        self.service.budget.release(reserved)
        self._counts.observe(method, path, status, seconds)

    def tell(
        self,
        scope: Mapping[str, Any],
        id_: bytes,
        status: int,
        seconds: float,
        error: BaseException | None,
    ) -> None:
        """Log and trace a request that has ended. Needless without ``talks`` and an error."""
        if self.config.access_log or error is not None:
            self._log.request(scope, id_, status, seconds, error)
        if self._traces is not None:
            known: dict[str, str | int] = {"edgeglm.request_id": id_.decode()}
            known["http.response.status_code"] = status
            name = f"{scope['method']} {route_of(scope['path'])}"
            self._traces.ended(name, scope["headers"], seconds, known, error)

    def check_size(self, size: int) -> None:
        """Raise TooLargeError for a body over the limit."""
        if size > self.config.max_body:
            limit = self.config.max_body
            raise TooLargeError(f"a body of {size} bytes or more is over the limit of {limit}; send less")

    def admit(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Raise what keeps a request out."""
        self.check_caller(path, headers)
        self.check_load(path)

    def check_caller(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Raise for a strange host or origin, or a wrong token: what the same head always gets."""
        host = headers.get(b"host", b"")
        if not self._hosts.know(host):
            raise ForbiddenError("this Host is none of the server's names; add it with --host-name")
        origin = headers.get(b"origin")
        if origin is not None and (not host or origin.partition(b"://")[2] != host):
            raise ForbiddenError("a page of another site may not ask this server; open the server's own page")
        if path not in self._open and not (self._open_below and path.startswith(self._open_below)):
            self._callers.check(headers.get(b"authorization", b""))

    def check_load(self, path: str) -> None:
        """Raise for too many requests or connections at a time."""
        if path in OPEN_PATHS:
            return  # a full server is not a dead one
        if self._active > self.config.max_requests:
            limit = self.config.max_requests
            self.service.crowded["requests"] += 1
            raise OverloadedError(f"the server works on {limit} requests already; try later")
        if len(self.connections) > self.config.max_connections:
            raise self.crowded()

    def crowded(self) -> CrowdedError:
        """Count one connection too many, and return what it is told."""
        self.service.crowded["connections"] += 1
        limit = self.config.max_connections
        return CrowdedError(f"the server holds {limit} connections already; close some, or try later")

    def id_for(self, headers: Mapping[bytes, bytes]) -> bytes:
        """Take the caller's id if it may stand in a log, or make one."""
        return self._callers.id_for(headers.get(b"x-request-id"))


class Guard:
    """Lets requests through to ``app``; what that raises is told in the protocol's ``{"error": ...}``."""

    def __init__(self, app: App, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # the server is told not to offer anything else
        began = time.perf_counter()
        gate, headers = self._gate, dict(scope["headers"])
        id_ = gate.id_for(headers)
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                identity: Identity = scope.get(_ANSWERED_BY) or gate.service.identity
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id_), *identity.headers]
            await send(message)

        body = _Body(gate, receive, headers)
        error: BaseException | None = None
        gate.enter()
        try:
            gate.admit(scope["path"], headers)
            body.reserve()
            await self._app(scope, body.receive, sending)
        except asyncio.CancelledError:
            status = status or 499
            raise
        except Exception as caught:
            error = caught
            if status:
                raise  # the answer has begun: only the connection can be cut
            refused, text, given = refused_answer(caught)
            await send_answer(sending, refused, text, given)
        finally:
            body.end()
            seconds = time.perf_counter() - began
            gate.leave(scope["method"], scope["path"], status, seconds, reserved=body.reserved)
            gate.tell(scope, id_, status, seconds, error)


class _Body:
    """Counts the bytes of one request's body as they come."""

    def __init__(self, gate: Gate, receive: Receive, headers: dict[bytes, bytes]) -> None:
        self._gate, self._receive = gate, receive
        length = headers.get(b"content-length", b"")
        self._announced = int(length) if length.isdigit() else None
        self._seen = 0
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._ended = self._late = False
        self.reserved = 0

    def reserve(self) -> None:
        """Refuse at once what says that it is too large."""
        if self._announced is not None:
            self._gate.check_size(self._announced)
            self._book(self._announced)

    async def receive(self) -> Message:
        """Return the next part. Raises TooLargeError, SlowCallerError and, if it never comes, GoneError."""
        if self._ended:
            return await self._receive()
        if self._timer is None:  # a timer of our own: wait_for would make a task for each request
            self._task = asyncio.current_task()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._gate.config.body_timeout, self._give_up)
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if not self._late:
                raise
            raise SlowCallerError("the body did not come in time; send it faster") from None
        if message["type"] != "http.request":
            raise GoneError("the caller hung up; send the whole request")
        self._seen += len(message.get("body", b""))
        self._gate.check_size(self._seen)
        if self._seen > self.reserved:
            self._book(self._seen - self.reserved)
        if not message.get("more_body"):
            self.end()
        return message

    def end(self) -> None:
        """Wait for no more of the body."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _give_up(self) -> None:
        self._late = True
        if self._task is not None:
            self._task.cancel()

    def _book(self, size: int) -> None:
        self._gate.service.budget.reserve(size)
        self.reserved += size


def answered_by(scope: MutableMapping[str, Any], identity: Identity) -> None:
    """Note which bundle a request was answered by: another one may serve when the answer is sent."""
    scope[_ANSWERED_BY] = identity


async def whole_body(receive: Receive) -> bytes:
    """Read a request's body. The guard's ``receive`` raises if the caller hangs up in the middle."""
    message = await receive()
    first: bytes = message.get("body", b"")
    if not message.get("more_body"):
        return first
    parts = [first]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    return b"".join(parts)


async def send_answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Send one answer in one piece."""
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def refused_answer(error: BaseException) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """Return the status, body and headers that tell an error."""
    refusal = refusal_of(error)
    headers = [_JSON]
    if refusal.retry_after is not None:
        headers.append((b"retry-after", b"%d" % refusal.retry_after))
    if isinstance(error, UnauthorizedError):
        headers.append((b"www-authenticate", b'Bearer realm="edgeglm"'))
    if isinstance(error, UnknownEncodingError):
        headers.append((b"accept-encoding", error.known))
    if isinstance(error, (TooLargeError, SlowCallerError, GoneError, CrowdedError)):
        headers.append((b"connection", b"close"))  # what is left of the body is not read
    return refusal.status, msgspec.json.encode({"error": words_of(error)}), headers
