"""A server whose engine takes its time, for tests of a full queue.

Run it with: a bundle, the rows it holds, the seconds of a call, the most bytes of a body, and of all bodies,
the requests at a time, the seconds that a caller may be silent, and those after which a call is given up, and
with it the runner.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from edgeglm.engines.fake import FakeEngine
from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.config import RunnerConfig
from edgeglm.serve.config import ServeConfig
from edgeglm.serve.server import Serving, serve
from edgeglm.serve.service import Service
from scripts.fixtures.colours import colour_engine


def _broken(_: Service) -> list[Route]:
    """A route that fails when its answer has begun."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"a beginning"
        warnings.warn("an odd thing", stacklevel=1)
        raise ValueError("broken \udc80 in the middle")

    async def midway(_: Request) -> StreamingResponse:
        return StreamingResponse(parts())

    return [Route("/broken", midway)]


def main(
    bundle: str,
    capacity: str,
    seconds: str,
    body: str,
    buffered: str = "268435456",
    requests: str = "64",
    idle: str = "75",
    hang_after: str = "",
) -> None:
    def slow_engine(path: Path, threads: int) -> FakeEngine:
        engine = colour_engine(path, threads)
        quick = engine._run

        def slow(feeds):
            time.sleep(float(seconds))
            return quick(feeds)

        engine._run = slow  # type: ignore[method-assign]
        return engine

    def said(where: Serving) -> None:
        sys.stdout.write(json.dumps({"http": where.http, "grpc": where.grpc}, indent=1) + "\n")
        sys.stdout.flush()

    config = ServeConfig(
        port=0,
        grpc_port=0,
        max_body=int(body),
        max_requests=int(requests),
        max_connections=128,
        max_buffered=int(buffered),
        body_timeout=1.0,
        send_timeout=1.0,
        idle_timeout=float(idle),
        runner=RunnerConfig(
            engine=slow_engine,
            when_full="shed",
            capacity=int(capacity),
            warm_up=False,
            hang_after=float(hang_after or "10"),
            max_replacements=0 if hang_after else 8,
            batching=BatchPolicy(max_batch_size=1),
        ),
    )
    serve(
        Path(bundle),
        config,
        routes=(_broken,),
        serving=said,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
