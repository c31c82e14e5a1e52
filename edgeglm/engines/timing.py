"""Latency of engines. Several are timed in turn, so that a slow minute of the machine hits them all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeglm.engines.protocol import Engine, Feeds

MIN_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds a call, over ``rounds`` calls after the warm-up."""

    median_ms: float
    p90_ms: float
    rounds: int


def measure_latency(engine: Engine, feeds: Feeds, *, rounds: int = 15, warmup: int = 2) -> Latency:
    """Time ``engine.infer(feeds)``, checks of the feeds included.

    Raises ValueError for fewer than ``MIN_ROUNDS`` rounds, whose p90 would say nothing.
    """
    return compare_latency({"": (engine, feeds)}, rounds=rounds, warmup=warmup)[""]


def compare_latency(
    engines: Mapping[str, tuple[Engine, Feeds]], *, rounds: int = 15, warmup: int = 2
) -> dict[str, Latency]:
    """Time several loaded engines interleaved: each round calls every one, starting with another."""
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds is {rounds}; give at least {MIN_ROUNDS}")
    names = list(engines)
    for _ in range(warmup):
        for engine, feeds in engines.values():
            engine.infer(feeds)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            engine, feeds = engines[name]
            started = time.perf_counter()
            engine.infer(feeds)
            samples[name].append((time.perf_counter() - started) * 1e3)
    return {name: _summary(times) for name, times in samples.items()}


def _summary(times_ms: list[float]) -> Latency:
    median, p90 = np.percentile(np.asarray(times_ms), [50, 90])
    return Latency(median_ms=float(median), p90_ms=float(p90), rounds=len(times_ms))
