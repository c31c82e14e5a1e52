"""The server: both faces over one service, from the first socket to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.routing import BaseRoute

from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.serve.app import asgi_app
from edgeglm.serve.config import ServeConfig
from edgeglm.serve.guard import App, Gate
from edgeglm.serve.library_logs import libraries_logged
from edgeglm.serve.logs import Log
from edgeglm.serve.metrics import HttpCounts
from edgeglm.serve.open_files import connections_allowed
from edgeglm.serve.quick_lane import quick_lane
from edgeglm.serve.service import SearcherMaker, Service
from edgeglm.serve.sockets import address_of, listening
from edgeglm.serve.traces import Traces

RoutesMaker = Callable[[Service], Sequence[BaseRoute]]
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Where a server listens, once it answers. ``grpc`` is None without that face."""

    http: str
    grpc: str | None
    service: Service


def serve(
    bundle: Path,
    config: ServeConfig | None = None,
    *,
    opened: Callable[[Path], Bundle] = open_bundle,
    searcher: SearcherMaker | None = None,
    routes: Sequence[RoutesMaker] = (),
    open_paths: tuple[str, ...] = (),
    notes: Sequence[str] = (),
    serving: Callable[[Serving], None] | None = None,
) -> None:
    """Serve a bundle until SIGTERM or SIGINT; what was accepted by then is answered.

    Args:
        bundle: Its path.
        config: The settings.
        opened: Opens a bundle.
        searcher: Makes what is searched; None for the bundle's gallery.
        routes: Each makes more routes for a service, such as those of a page.
        open_paths: What of them needs no token.
        notes: What the log begins with.
        serving: Called once requests are answered.

    Raises:
        UserError: A bundle that cannot be used, a port in use, a certificate that cannot be read.
    """
    config = config or ServeConfig()
    with (
        Log(sys.stderr.buffer) as log,
        libraries_logged(log),
        contextlib.ExitStack() as sockets,
    ):
        for note in notes:
            log.event("warning", "note", {"message": note})
        config = _within_open_files(config, log)
        bound = sockets.enter_context(listening(config.host, config.port, what="HTTP", option="--port"))
        work = _serve(
            bundle, config, bound, log,
            opened=opened, searcher=searcher, routes=routes, open_paths=open_paths, serving=serving,
        )  # fmt: skip
        _run(work)


def _within_open_files(config: ServeConfig, log: Log) -> ServeConfig:
    """Take no more connections than the system lets this process hold, so that the last is told why."""
    allowed = connections_allowed(config.max_connections)
    if allowed == config.max_connections:
        return config
    log.event(
        "warning",
        "fewer-connections",
        {"wanted": config.max_connections, "allowed": allowed, "remedy": "raise 'ulimit -n'"},
    )
    return replace(config, max_connections=allowed)


async def _serve(
    bundle: Path,
    config: ServeConfig,
    bound: socket.socket,
    log: Log,
    *,
    opened: Callable[[Path], Bundle],
    searcher: SearcherMaker | None,
    routes: Sequence[RoutesMaker],
    open_paths: tuple[str, ...],
    serving: Callable[[Serving], None] | None,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    http, grpc = HttpCounts(), HttpCounts()
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(Service(bundle, config, opened=opened, searcher=searcher))
        traces = Traces(service.identity.facts) if config.traces else None
        if traces is not None:
            stack.callback(traces.close)
        grpc_address = None
        if config.grpc_port is not None:
            from edgeglm.serve.grpc_face import grpc_face

            grpc_address = await stack.enter_async_context(grpc_face(service, log, grpc, traces))
        extra = [route for make in routes for route in make(service)]
        gate = Gate(service, log, http, open_paths=open_paths, traces=traces)
        server = _server(asgi_app(gate, http=http, grpc=grpc, routes=extra), gate)
        running = asyncio.ensure_future(server.serve(sockets=[bound]))
        stack.push_async_callback(_stopped, server, running)
        scheme = "https" if config.certificate else "http"
        where = Serving(http=f"{scheme}://{address_of(bound)}", grpc=grpc_address, service=service)
        fields = {"http": where.http, "grpc": where.grpc, **service.identity.facts}
        log.event("info", "serving", fields)
        if serving is not None:
            serving(where)
        _spare_the_collector()
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        service.stopping.set()
        log.event("info", "draining", {"held": service.runner.stats().held})
    log.event("info", "stopped")


def _spare_the_collector() -> None:
    """Keep what was loaded out of garbage collection, which took a fifth of a small request's time.

    What is garbage by then stays: to look for it would hold up the first answers by longer than it is worth.
    """
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


async def _stopped(server: uvicorn.Server, running: asyncio.Future[None]) -> None:
    server.should_exit = True
    await running


class _QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process with the signal's code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: App, gate: Gate) -> uvicorn.Server:
    config = gate.config
    return _QuietServer(
        uvicorn.Config(
            app,
            http=quick_lane(gate),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(config.idle_timeout) or 1,
            timeout_graceful_shutdown=int(config.drain_timeout) or 1,
            ssl_certfile=config.certificate,
            ssl_keyfile=config.key,
            h11_max_incomplete_event_size=None,
        )
    )


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run in uvloop, whose sockets cost about half of asyncio's own."""
    import uvloop

    if sys.version_info >= (3, 11):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)
    else:
        uvloop.install()
        asyncio.run(work)
