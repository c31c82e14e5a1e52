"""Spans of requests for OpenTelemetry, where it is installed and asked for.

A span is made when its request has ended, with the times of the request: a server that traces nothing pays
nothing, and one that does pays once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any


class Traces:
    """Sends spans where the ``OTEL_EXPORTER_OTLP_*`` variables say.

    Args:
        facts: What is said of the server in each batch of spans, such as the bundle's digest.
    """

    def __init__(self, facts: Mapping[str, object]) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = {f"edgeglm.{name}": str(value) for name, value in facts.items() if name != "models"}
        resource = Resource.create({"service.name": "edgeglm", **named})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("edgeglm.serve")
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER

    def ended(
        self,
        name: str,
        headers: Iterable[tuple[Any, Any]],
        seconds: float,
        attributes: Mapping[str, str | int],
        error: BaseException | None,
    ) -> None:
        """Note a request that has just ended, under the caller's ``traceparent`` if it sent one."""
        carrier = {}
        for key, value in headers:
            text = key.decode("latin-1") if isinstance(key, bytes) else key
            if text in ("traceparent", "tracestate"):
                carrier[text] = value.decode("latin-1") if isinstance(value, bytes) else value
        end = time.time_ns()
        span = self._tracer.start_span(
            name,
            context=self._propagator.extract(carrier),
            kind=self._kind,
            attributes=dict(attributes),
            start_time=end - int(seconds * 1e9),
        )
        if error is not None:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR, str(error)[:200])
        span.end(end)

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()
