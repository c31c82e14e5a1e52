"""The Open Inference Protocol's other routes: health, metadata, statistics, and the model repository.

Source: the Open Inference Protocol, and Triton's model repository, model configuration and statistics
extensions.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeglm import __version__
from edgeglm.core.errors import UserError
from edgeglm.runtime.times import StageTimes, Times
from edgeglm.serve.json_answers import json_answer, parsed
from edgeglm.serve.models import model_config, model_metadata
from edgeglm.serve.refusals import NotReadyError
from edgeglm.serve.service import Service

EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics", "parameters")
_MODEL = "/v2/models/{name}"


class _LoadParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    config: str | None = None
    bundle: str | None = None
    unload_dependents: bool = False


class _LoadRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    parameters: _LoadParameters = _LoadParameters()


class _IndexRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ready: bool = False


class _LoadConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    bundle: str


def server_metadata(service: Service) -> dict[str, Any]:
    """Return the protocol's server metadata, and which bundle serves."""
    return {
        "name": "edgeglm",
        "version": __version__,
        "extensions": EXTENSIONS,
        "edgeglm": service.identity.facts,
    }


def repository_index(service: Service, *, ready_only: bool) -> list[dict[str, str]]:
    """Return the protocol's repository index."""
    return [
        {
            "name": name,
            "version": service.version,
            "state": "UNAVAILABLE" if why else "READY",
            "reason": why,
        }
        for name, why in service.states().items()
        if not (why and ready_only)
    ]


def bundle_asked(config: str | None, bundle: str | None) -> str | None:
    """Return the bundle that a load names, itself or as ``{"bundle": NAME}`` in the ``config`` of clients."""
    if bundle is not None or config is None:
        return bundle
    return parsed(config.encode(), _LoadConfig, 'config with {"bundle": NAME}').bundle


def model_statistics(service: Service, names: list[str]) -> dict[str, Any]:
    """Return how many rows and calls each model's tower had, and their times; a tower's models share them."""
    stats, times = service.runner.stats(), service.runner.times()
    found = []
    for name in names:
        tower = service.known(name).tower
        calls = stats.batches.get(tower, {})
        found.append(
            {
                "name": name,
                "version": service.version,
                "inference_count": sum(size * count for size, count in calls.items()),
                "execution_count": sum(calls.values()),
                "inference_stats": _durations(times, tower),
                "batch_stats": [{"batch_size": size, "count": count} for size, count in calls.items()],
            }
        )
    return {"model_stats": found}


def _durations(times: StageTimes, tower: str) -> dict[str, dict[str, int]]:
    """Return what Triton's clients divide: the engine's calls, and how long their oldest requests waited.

    The runner times calls and no requests. What it does not time is there without a count, for such clients.
    """
    calls, waits = (times.get((stage, tower), Times()) for stage in ("engine", "engine-wait"))
    timed = {"success": calls.sum + waits.sum, "queue": waits.sum, "compute_infer": calls.sum}
    count, none = sum(calls.counts), {"count": 0, "ns": 0}
    found = dict.fromkeys(("fail", "compute_input", "compute_output"), none)
    return found | {name: {"count": count, "ns": round(seconds * 1e9)} for name, seconds in timed.items()}


def routes(service: Service) -> list[Route]:
    """Return the routes."""

    async def live(_: Request) -> Response:
        if why := service.why_lost:
            raise NotReadyError(why)
        return Response()

    async def ready(_: Request) -> Response:
        if why := service.why_not_ready:
            raise NotReadyError(why)
        return Response()

    async def server(_: Request) -> Response:
        return json_answer(server_metadata(service))

    async def model_ready(request: Request) -> Response:
        service.model(*_model(request))
        if why := service.why_not_ready:
            raise NotReadyError(why)
        return Response()

    async def metadata(request: Request) -> Response:
        return json_answer(model_metadata(service.known(*_model(request)), service.version))

    async def config(request: Request) -> Response:
        return json_answer(model_config(service.known(*_model(request)), service.config.max_rows))

    async def stats(request: Request) -> Response:
        return json_answer(model_statistics(service, [service.known(*_model(request)).name]))

    async def all_stats(_: Request) -> Response:
        return json_answer(model_statistics(service, list(service.models)))

    async def index(request: Request) -> Response:
        body = await request.body()
        asked = parsed(body, _IndexRequest, "index request") if body else _IndexRequest()
        return json_answer(repository_index(service, ready_only=asked.ready))

    async def load(request: Request) -> Response:
        body = await request.body()
        given = (parsed(body, _LoadRequest, "load request") if body else _LoadRequest()).parameters
        if given.unload_dependents:
            raise UserError("models here have no dependents; leave unload_dependents out")
        await service.load(request.path_params["name"], bundle_asked(given.config, given.bundle))
        return Response()

    async def unload(request: Request) -> Response:
        body = await request.body()
        if body:
            parsed(body, _LoadRequest, "unload request")
        await service.unload(request.path_params["name"])
        return Response()

    found = [
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/models/stats", all_stats),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{name}/load", load, methods=["POST"]),
        Route("/v2/repository/models/{name}/unload", unload, methods=["POST"]),
    ]
    for last, endpoint in (("/ready", model_ready), ("", metadata), ("/config", config), ("/stats", stats)):
        found += [
            Route(f"{_MODEL}{last}", endpoint),
            Route(f"{_MODEL}/versions/{{version}}{last}", endpoint),
        ]
    return found


def _model(request: Request) -> tuple[str, str]:
    return request.path_params["name"], request.path_params.get("version", "")
