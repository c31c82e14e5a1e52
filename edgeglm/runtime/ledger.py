"""What a runner has done: counted as requests end, shown to its owner."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeglm.runtime.generation import Generation
from edgeglm.runtime.times import StageTimes, added

Event = Literal["turned_away", "answered", "failed", "expired", "cancelled", "shed"]

_EVENTS: tuple[Event, ...] = (
    "turned_away",
    "answered",
    "failed",
    "expired",
    "cancelled",
    "shed",
)
_LATENCIES_KEPT = 4096
_POINTS = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}


@dataclass(frozen=True, kw_only=True)
class RunnerStats:
    """What a runner has done so far.

    ``accepted + turned_away == answered + failed + expired + cancelled + shed + held``, at any time.

    Attributes:
        accepted: Requests that got a place.
        turned_away: Requests that expired or were shed without ever having had a place.
        answered: Ended with a result.
        failed: Ended with an error of the input or the engine.
        expired: Ended at their deadline, those that never got a place included.
        cancelled: Ended by their caller.
        shed: Refused, or taken out for a more urgent one, because the runner was full.
        held: Waiting or running now.
        waiting: Waiting for an engine or for preparation now.
        replaced: Workers that hung and were replaced.
        instances: Engine instances that serve or are being opened, a former bundle's included until it has
            gone. Fewer than asked for where a replacement could not be opened, which is tried again.
        batches: ``{tower: {batch size: calls}}``; the second tries of halved batches count too.
        latency_ms: ``{"p50": ..., "p90": ..., "p99": ..., "p99.9": ...}`` of the latest answers, from the
            call to the result; empty before the first.
    """

    accepted: int
    turned_away: int
    answered: int
    failed: int
    expired: int
    cancelled: int
    shed: int
    held: int
    waiting: int
    replaced: int
    instances: int
    batches: dict[str, dict[int, int]]
    latency_ms: dict[str, float]


class Ledger:
    """Counts of one runner. For its event loop."""

    def __init__(self) -> None:
        self.accepted = 0
        self._counts: dict[Event, int] = dict.fromkeys(_EVENTS, 0)
        self._latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._past_batches: Counter[tuple[str, int]] = Counter()
        self._past_replaced = 0
        self._past_times: StageTimes = {}

    def count(self, event: Event) -> None:
        """Note one event."""
        self._counts[event] += 1

    def answered(self, seconds: Sequence[float]) -> None:
        """Note answers and how long each took."""
        self._counts["answered"] += len(seconds)
        self._latencies.extend(seconds)

    def retire(self, generation: Generation) -> None:
        """Keep what a generation did, which is about to go."""
        self._past_batches.update(generation.inference.batch_counts())
        self._past_replaced += generation.replaced
        for crew in generation.crews:
            added(self._past_times, crew.times())

    def times(self, generations: Sequence[Generation]) -> StageTimes:
        """Sum up how long the stages took."""
        total: StageTimes = {}
        added(total, self._past_times)
        for crew in (crew for generation in generations for crew in generation.crews):
            added(total, crew.times())
        return total

    def stats(self, generations: Sequence[Generation], held: int) -> RunnerStats:
        """Sum up."""
        batches = self._past_batches.copy()
        for generation in generations:
            batches.update(generation.inference.batch_counts())
        by_tower: dict[str, dict[int, int]] = {}
        for (tower, size), calls in sorted(batches.items()):
            by_tower.setdefault(tower, {})[size] = calls
        latency: dict[str, float] = {}
        if self._latencies:
            points = np.percentile(np.asarray(self._latencies) * 1e3, list(_POINTS.values()))
            latency = {name: float(p) for name, p in zip(_POINTS, points, strict=True)}
        return RunnerStats(
            accepted=self.accepted,
            **self._counts,
            held=held,
            waiting=sum(len(crew) for generation in generations for crew in generation.crews),
            replaced=self._past_replaced + sum(generation.replaced for generation in generations),
            instances=sum(generation.instances for generation in generations),
            batches=by_tower,
            latency_ms=latency,
        )
