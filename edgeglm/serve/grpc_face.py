"""The gRPC face: who may call, limits, ids, logs and counts around the protocol's methods."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from edgeglm.core.errors import UserError
from edgeglm.runtime.requests import OverloadedError
from edgeglm.serve.callers import Callers
from edgeglm.serve.config import ServeConfig
from edgeglm.serve.grpc_messages import message, service_descriptor
from edgeglm.serve.grpc_methods import Methods
from edgeglm.serve.logs import Log
from edgeglm.serve.metrics import HttpCounts
from edgeglm.serve.refusals import refusal_of, words_of
from edgeglm.serve.service import Service
from edgeglm.serve.traces import Traces

_OPEN = frozenset({"ServerLive", "ServerReady"})


@asynccontextmanager
async def grpc_face(
    service: Service, log: Log, counts: HttpCounts, traces: Traces | None = None
) -> AsyncIterator[str]:
    """Serve gRPC; gives the address. At the end, calls that began are answered within ``drain_timeout``.

    Raises UserError for a port in use, or a certificate that cannot be read.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core would write plain text between the log's lines
    import grpc

    config = service.config
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),  # else a port in use is shared, and nobody told
            ("grpc.max_receive_message_length", config.max_body),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.max_connection_idle_ms", int(config.idle_timeout * 1000)),
        ],
    )
    handlers = _handlers(_Calls(service, log, counts, traces), Methods(service))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),)
    )
    address = _bound(server, config)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(config.drain_timeout)


def _bound(server: Any, config: ServeConfig) -> str:
    import grpc

    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        if config.certificate is None or config.key is None:
            port = server.add_insecure_port(f"{host}:{config.grpc_port}")
        else:
            pair = (config.key.read_bytes(), config.certificate.read_bytes())
            port = server.add_secure_port(f"{host}:{config.grpc_port}", grpc.ssl_server_credentials([pair]))
    except (RuntimeError, OSError):
        port = 0
    if not port:
        raise UserError(
            f"cannot listen on {host}:{config.grpc_port} for gRPC: another program listens there, or it is "
            "not allowed; give --grpc-port another port"
        )
    return f"{host}:{port}"


def _handlers(calls: _Calls, methods: Methods) -> dict[str, Any]:
    import grpc

    handlers = {}
    for method in service_descriptor().methods:
        reads = message(method.input_type.name).FromString
        writes = message(method.output_type.name).SerializeToString
        if method.name == "ModelStreamInfer":
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(
                calls.streamed(method.name, methods.stream_infer), reads, writes
            )
        elif method.name == "ModelInfer":  # reads and writes bytes by itself
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                calls.single(method.name, methods.model_infer, bytes)
            )
        else:  # messages come as bytes, to be booked before they are read
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                calls.single(method.name, methods.named(method.name), reads), None, writes
            )
    return handlers


def _read(data: bytes, reads: Callable[[bytes], Any]) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return reads(data)
    except DecodeError:
        raise UserError("the bytes are no such message; send what the protocol describes") from None


class _Calls:
    """Wraps methods."""

    def __init__(self, service: Service, log: Log, counts: HttpCounts, traces: Traces | None) -> None:
        import grpc

        self._service, self._log, self._counts = service, log, counts
        self._traces = traces
        self._access_log = service.config.access_log
        self._callers = Callers(service.config.token)
        self._active = 0
        self._codes = {code.name: code for code in grpc.StatusCode}

    def single(
        self, name: str, method: Callable[[Any, Any], Awaitable[Any]], reads: Callable[[bytes], Any]
    ) -> Callable[[bytes, Any], Any]:
        """Wrap a method that takes one message and gives one."""
        budget = self._service.budget

        async def call(data: bytes, context: Any) -> Any:
            began = time.perf_counter()
            self._active += 1
            id_, error, code, reserved = "", None, "OK", 0
            try:
                id_, token = self._named(context)
                self._admit(name, token)
                budget.reserve(len(data))
                reserved = len(data)
                return await method(_read(data, reads), context)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except Exception as caught:
                error, code = caught, refusal_of(caught).grpc
                await self._refuse(caught, context, id_)
            finally:
                budget.release(reserved)
                self._end(name, id_, code, began, context, error)

        return call

    def streamed(
        self, name: str, method: Callable[[Any, Any], AsyncGenerator[Any, None]]
    ) -> Callable[[Any, Any], Any]:
        """Wrap a method of two streams."""

        async def call(requests: Any, context: Any) -> AsyncIterator[Any]:
            began = time.perf_counter()
            self._active += 1
            id_, error, code = "", None, "OK"
            try:
                id_, token = self._named(context)
                self._admit(name, token)
                async with aclosing(method(requests, context)) as answers:
                    async for answer in answers:
                        yield answer
            except (asyncio.CancelledError, GeneratorExit):
                code = "CANCELLED"
                raise
            except Exception as caught:
                error, code = caught, refusal_of(caught).grpc
                await self._refuse(caught, context, id_)
            finally:
                self._end(name, id_, code, began, context, error)

        return call

    def _named(self, context: Any) -> tuple[str, bytes]:
        """Return the call's id and token; note the id and the bundle's identity for its end."""
        given, token = None, b""
        for key, value in context.invocation_metadata() or ():
            if key == "x-request-id":
                given = value.encode()
            elif key == "authorization":
                token = value.encode()
        id_ = self._callers.id_for(given).decode()
        context.set_trailing_metadata((("x-request-id", id_), *self._service.identity.metadata))
        return id_, token

    def _admit(self, name: str, token: bytes) -> None:
        """Raise what keeps a call out: its token, or too many at a time."""
        if name in _OPEN:
            return  # a full server is not a dead one
        self._callers.check(token)
        limit = self._service.config.max_requests
        if self._active > limit:
            self._service.crowded["calls"] += 1
            raise OverloadedError(f"the server works on {limit} calls already; try later")

    async def _refuse(self, error: Exception, context: Any, id_: str) -> None:
        refusal = refusal_of(error)
        trailing = [("x-request-id", id_), *self._service.identity.metadata]
        if refusal.retry_after is not None:
            trailing += [("retry-after", str(refusal.retry_after))]
            trailing += [("grpc-retry-pushback-ms", str(refusal.retry_after * 1000))]
        await context.abort(self._codes[refusal.grpc], words_of(error), tuple(trailing))

    def _end(
        self, name: str, id_: str, code: str, began: float, context: Any, error: Exception | None
    ) -> None:
        self._active -= 1
        seconds = time.perf_counter() - began
        self._counts.observe_call(name, code, seconds)
        if self._access_log or error is not None:
            self._log.call(name, id_, code, seconds, context.peer(), error)
        if self._traces is not None:
            known = {"rpc.grpc.status": code, "edgeglm.request_id": id_}
            self._traces.ended(name, context.invocation_metadata() or (), seconds, known, error)
