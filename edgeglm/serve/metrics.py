"""What an operator watches, as Prometheus reads it.

Requests only increment plain counts; a collector turns those, the runner's books and the board's sensors
into metrics when somebody scrapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from edgeglm.engines.board import Conditions
from edgeglm.runtime.ledger import RunnerStats
from edgeglm.runtime.times import SECONDS, StageTimes, Times
from edgeglm.serve.service import Service

Labels = tuple[str, str, str]  # method, route, status
_KEPT = 256  # kinds of answers that are known by their path
_LONG = 200  # characters of a path that is not kept
_KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class HttpCounts:
    """Counts of one face, HTTP or gRPC: by route and status, never by what a caller may make up."""

    def __init__(self) -> None:
        self.answers: Counter[Labels] = Counter()
        self.times: dict[str, Times] = {}
        self._known: dict[tuple[str, str, int], tuple[Labels, Times]] = {}

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count an answer of the HTTP face."""
        asked = method, path, status
        known = self._known.get(asked)
        if known is None:
            known = self._learnt(asked)
        labels, times = known
        self.answers[labels] += 1
        times.observe(seconds)

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        """Count an answer of the gRPC face."""
        self.answers["grpc", method, code] += 1
        self._times(method).observe(seconds)

    def _learnt(self, asked: tuple[str, str, int]) -> tuple[Labels, Times]:
        """Note what a request is counted as; a caller may make paths up, so not for ever."""
        method, path, status = asked
        route = route_of(path)
        labels = method if method in _KNOWN_METHODS else "other", route, str(status)
        if len(self._known) >= _KEPT:
            self._known.clear()
        found = labels, self._times(route)
        if len(path) < _LONG:
            self._known[asked] = found
        return found

    def _times(self, route: str) -> Times:
        times = self.times.get(route)
        if times is None:
            times = self.times[route] = Times()
        return times


def route_of(path: str) -> str:
    """Return one of a few names for a path, so that callers cannot make metrics without end."""
    return _route_of(path) if len(path) < _LONG else _route_of.__wrapped__(path)


@lru_cache(maxsize=256)
def _route_of(path: str) -> str:
    if path.startswith("/v2/models/"):
        last = path.rpartition("/")[2]
        return f"/v2/models/{last}" if last in ("infer", "ready", "config", "stats") else "/v2/models"
    if path.startswith("/v2/repository/"):
        return "/v2/repository"
    first = "/".join(path.split("/", 3)[:3])
    return first if first in _ROUTES else "other"


_ROUTES = frozenset(
    {"/", "/v2", "/v2/health", "/metrics", "/v1/embed", "/v1/search", "/v1/stats", "/v1/info", "/v1/pictures"}
)


class Collector:
    """Gives Prometheus's client library the metrics of a service.

    Args:
        service: The bundle in service.
        http: Counts of one face.
        grpc: Counts of the other.
        board: What the board's sensors say. They are slow to read, and so not read in the event loop.
    """

    def __init__(self, service: Service, http: HttpCounts, grpc: HttpCounts, board: Conditions) -> None:
        self._service, self._http, self._grpc, self._seen = service, http, grpc, board

    def collect(self) -> Iterator[Any]:
        """Yield the metric families."""
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        service = self._service
        facts = {name: str(value) for name, value in service.identity.facts.items() if name != "models"}
        yield InfoMetricFamily("edgeglm_bundle", "The bundle in service.", value=facts)
        ready = GaugeMetricFamily("edgeglm_ready", "Whether requests are answered.")
        ready.add_metric([], float(service.ready))
        yield ready
        yield from _faces({"http": self._http, "grpc": self._grpc})
        stats = service.runner.stats()
        yield from _runner(stats)
        yield _shed({"queue": stats.shed, "bytes": service.budget.refused, **service.crowded})
        yield from _stages(service.runner.times())
        yield from _board(self._seen)


def exposition(collector: Collector) -> bytes:
    """Return the text that Prometheus scrapes."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return bytes(generate_latest(registry))


def buckets_of(times: Times) -> list[tuple[str, float]]:
    """Return cumulative counts as Prometheus has them."""
    found, total = [], 0
    for bound, count in zip((*map(str, SECONDS), "+Inf"), times.counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found


def _stages(times: StageTimes) -> Iterator[Any]:
    from prometheus_client.core import HistogramMetricFamily

    text = "Calls of a stage; with -wait, from the oldest request of a call to its beginning."
    family = HistogramMetricFamily("edgeglm_stage_seconds", text, labels=["stage", "tower"])
    for (stage, tower), kept in sorted(times.items()):
        family.add_metric([stage, tower], buckets=buckets_of(kept), sum_value=kept.sum)
    yield family


def _faces(faces: dict[str, HttpCounts]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    answers = CounterMetricFamily(
        "edgeglm_requests", "Answers by route and status.", labels=["method", "route", "status"]
    )
    times = HistogramMetricFamily(
        "edgeglm_request_seconds", "From the request's head to its answer.", labels=["face", "route"]
    )
    for face, counts in faces.items():
        for labels, count in tuple(counts.answers.items()):
            answers.add_metric(list(labels), count)
        for route, kept in tuple(counts.times.items()):
            times.add_metric([face, route], buckets=buckets_of(kept), sum_value=kept.sum)
    yield answers
    yield times


def _shed(counts: Mapping[str, int]) -> Any:
    from prometheus_client.core import CounterMetricFamily

    text = (
        "Refused because full: rows by the queue; requests by bytes, requests, calls over gRPC, connections."
    )
    family = CounterMetricFamily("edgeglm_shed", text, labels=["full"])
    for full in ("queue", "bytes", "requests", "calls", "connections"):
        family.add_metric([full], counts.get(full, 0))
    return family


def _runner(stats: RunnerStats) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    for name, value, text in (
        ("accepted", stats.accepted, "Rows that the runner took."),
        ("answered", stats.answered, "Rows that ended with a result."),
        ("failed", stats.failed, "Rows that ended with an error of the input or the engine."),
        ("deadline_missed", stats.expired, "Rows that ended at their deadline."),
        ("cancelled", stats.cancelled, "Rows whose caller went away."),
        ("workers_replaced", stats.replaced, "Workers that hung and were replaced."),
    ):
        counter = CounterMetricFamily(f"edgeglm_{name}", text)
        counter.add_metric([], value)
        yield counter
    for name, value, text in (
        ("held", stats.held, "Rows waiting or running now."),
        ("engine_instances", stats.instances, "Engine instances that serve or are being opened."),
        ("queue_depth", stats.waiting, "Rows waiting for preparation or an engine now."),
    ):
        gauge = GaugeMetricFamily(f"edgeglm_{name}", text)
        gauge.add_metric([], value)
        yield gauge
    sizes = (1, 2, 4, 8, 16, 32, 64, 128)
    batches = HistogramMetricFamily("edgeglm_batch_size", "Rows of one engine call.", labels=["tower"])
    for tower, calls in stats.batches.items():
        buckets = [(str(s), float(sum(n for size, n in calls.items() if size <= s))) for s in sizes]
        buckets.append(("+Inf", float(sum(calls.values()))))
        batches.add_metric([tower], buckets=buckets, sum_value=sum(size * n for size, n in calls.items()))
    yield batches


def _board(found: Conditions) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily

    for name, text, label, values in (
        ("edgeglm_temperature_celsius", "Thermal zones.", "zone", found.temperatures_c),
        ("edgeglm_clock_megahertz", "Present clocks.", "unit", found.clocks_mhz),
        ("edgeglm_power_milliwatts", "Power of the board's rails.", "rail", found.rails_mw),
        (
            "edgeglm_throttled",
            "Cooling devices that hold something back.",
            "device",
            dict.fromkeys(found.throttled, 1.0),
        ),
    ):
        if values:
            gauge = GaugeMetricFamily(name, text, labels=[label])
            for key, value in values.items():
                gauge.add_metric([key], value)
            yield gauge
