"""The HTTP face as one ASGI application: the guard, the way of inference, and all other routes.

Starlette routes and parses what is asked now and then. The inference route is plain ASGI, since it is what
an overhead of microseconds is promised for.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route, Router

from edgeglm.serve import operator_routes, plain_routes, v2_routes
from edgeglm.serve.guard import App, Gate, Guard, Receive, Send
from edgeglm.serve.json_answers import json_answer
from edgeglm.serve.metrics import HttpCounts
from edgeglm.serve.v2_infer import InferRoute


def asgi_app(gate: Gate, *, http: HttpCounts, grpc: HttpCounts, routes: Sequence[BaseRoute] = ()) -> App:
    """Return the application.

    Args:
        gate: Whom it lets in, and the service.
        http: This face's counts, for ``/metrics``.
        grpc: The other face's.
        routes: More routes, such as those of a page.
    """
    service = gate.service
    infer = InferRoute(service)
    router = Router(
        routes=[
            Route("/v2/models/{name}/infer", infer, methods=["POST"]),  # for what is said of other methods
            Route("/v2/models/{name}/versions/{version}/infer", infer, methods=["POST"]),
            *v2_routes.routes(service),
            *plain_routes.routes(service),
            *operator_routes.routes(service, http, grpc),
            *routes,
        ]
    )

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path.startswith("/v2/models/") and path.endswith("/infer") and scope["method"] == "POST":
            await infer(scope, receive, send)
            return
        scope["app"] = router  # the router then raises what it refuses
        try:
            await router(scope, receive, send)
        except HTTPException as error:
            answer = json_answer({"error": _words(error)}, status=error.status_code)
            answer.headers.update(error.headers or {})
            await answer(scope, receive, send)

    return Guard(app, gate)


def _words(error: HTTPException) -> str:
    """Say in our words what the router refuses."""
    if error.status_code == 404:
        return "there is nothing at this path; see /openapi.json"
    if error.status_code == 405:
        methods = " or ".join(sorted((error.headers or {})["Allow"].split(", ")))
        return f"this path does not take that method; use {methods}"
    return error.detail
