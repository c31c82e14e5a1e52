"""What an operator asks of a server: metrics, figures for a page, what is served, and how to ask."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeglm.engines.tegrastats import Sensors
from edgeglm.serve.json_answers import json_answer
from edgeglm.serve.metrics import Collector, HttpCounts, exposition
from edgeglm.serve.search import described
from edgeglm.serve.service import Service

OPENAPI = Path(__file__).with_name("openapi.json")


def routes(service: Service, http: HttpCounts, grpc: HttpCounts) -> list[Route]:
    """Return the routes."""
    sensors = Sensors()

    async def metrics(_: Request) -> Response:
        collector = Collector(service, http, grpc, await asyncio.to_thread(sensors.read))
        return Response(exposition(collector), media_type="text/plain; version=0.0.4")

    async def stats(_: Request) -> Response:
        searcher = service.served.searcher
        return json_answer(
            {
                "uptime_s": round(time.time() - service.started, 1),
                "ready": service.ready,
                "runner": msgspec.to_builtins(service.runner.stats(), str_keys=True),
                "searched": described(searcher, searcher.size) if searcher else None,
                "edgeglm": service.identity.facts,
            }
        )

    async def info(_: Request) -> Response:
        manifest = service.bundle.manifest
        variant = service.bundle.variant(service.identity.precision)
        return json_answer(
            {
                "edgeglm": service.identity.facts,
                "created": manifest.created,
                "variants": [record.name for record in manifest.variants],
                "metrics": variant.metrics,
                "models": service.states(),
                "limits": {
                    "body_bytes": service.config.max_body,
                    "rows": service.config.max_rows,
                    "requests": service.config.max_requests,
                    "queue": service.config.runner.capacity,
                },
            }
        )

    async def openapi(_: Request) -> Response:
        return Response(OPENAPI.read_bytes(), media_type="application/json")

    return [
        Route("/metrics", metrics),
        Route("/v1/stats", stats),
        Route("/v1/info", info),
        Route("/openapi.json", openapi),
    ]
