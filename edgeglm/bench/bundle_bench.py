"""A scenario on a bundle: golden inputs through the runner, as LoadGen sends them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgeglm.bench.loadgen import Ask, Load, drive
from edgeglm.bench.measurement import Measurement, Scenario, latency_summary
from edgeglm.bundle.goldens import goldens
from edgeglm.bundle.opened import Bundle
from edgeglm.core.errors import UserError
from edgeglm.engines.board import this_board
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.runner import Runner

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")
_PROBE_SECONDS = 1.0
_WEEK = 7 * 86_400  # seconds
_MOST_QUERIES = 10_000_000


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
        scenario: In which manner queries come.
        tower: What they ask for; raw pictures and texts, so that preparation counts.
        seconds: For how long.
        rate: Queries a second; needed by, and only by, the server scenario.
        bound_ms: The p99 that the server scenario must keep.
        runner: How the runner behaves.
    """

    scenario: Scenario = "single-stream"
    tower: Tower = "text"
    seconds: float = 10.0
    rate: float | None = None
    bound_ms: float = 100.0
    runner: RunnerConfig = field(default_factory=RunnerConfig)

    def __post_init__(self) -> None:
        for name, most in (("seconds", _WEEK), ("bound_ms", _WEEK * 1000)):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; give a finite number above 0")
            if value > most:
                raise UserError(f"{name} is {value}, longer than a week; give at most {most}")
        if (self.rate is not None) != (self.scenario == "server"):
            raise UserError(
                "the server scenario, and only that one, needs a rate; "
                "give --rate, such as three quarters of what --scenario offline shows"
            )
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UserError(f"rate is {self.rate}; give queries a second, finite and above 0")
        if self.rate is not None:
            _check_memory(self.rate, self.seconds, "queries", "lower --rate or --seconds")


async def bundle_measurement(bundle: Bundle, config: BenchConfig) -> Measurement:
    """Measure one scenario on an opened bundle.

    Raises UserError for a bundle without golden inputs or an unknown variant, EdgeglmError if samples
    were not answered.
    """
    inputs = _inputs(bundle, config.tower)
    async with Runner(bundle, config.runner) as runner:

        async def ask(index: int) -> object:
            item = inputs[index]
            if isinstance(item, str):
                return await runner.embed_text(item)
            return await runner.embed_image(item)

        variant, engine = runner.serving
        rate = config.rate or await _probed_rate(ask, len(inputs))
        _check_memory(rate, config.seconds, "samples", "lower --seconds")
        before = runner.stats().batches.get(config.tower, {})
        report = await drive(
            ask,
            Load(
                scenario=config.scenario,
                seconds=config.seconds,
                inputs=len(inputs),
                rate=rate,
                bound_ms=config.bound_ms,
            ),
        )
        after = runner.stats().batches[config.tower]
    latency, curve = latency_summary(report.latencies_ms)
    return Measurement(
        bundle=bundle.manifest.name,
        content_digest=bundle.manifest.content_digest,
        variant=variant,
        engine=engine,
        tower=config.tower,
        scenario=config.scenario,
        machine=this_board().words,
        settings=_settings(config),
        queries=report.queries,
        samples=report.samples,
        seconds=round(report.seconds, 4),
        throughput=round(report.samples / report.seconds, 3),
        latency_ms=latency,
        curve_ms=curve,
        batches={
            size: calls - before.get(size, 0) for size, calls in after.items() if calls > before.get(size, 0)
        },
        valid=report.valid,
        verdict=report.verdict,
    )


def _inputs(bundle: Bundle, tower: Tower) -> Sequence[str | bytes]:
    found = goldens(bundle)
    inputs: Sequence[str | bytes] = (
        found.texts if tower == "text" else [Path(path).read_bytes() for path in found.images]
    )
    if not inputs:
        raise UserError(
            f"the bundle {bundle.origin} has no golden inputs for {tower}; build it again with them"
        )
    return inputs


def _check_memory(rate: float, seconds: float, what: str, remedy: str) -> None:
    """Raise UserError for a run of which LoadGen could not make all samples ready."""
    if rate * seconds > _MOST_QUERIES:
        raise UserError(
            f"{rate:g} {what} a second for {seconds:g} s are more than the {_MOST_QUERIES:,} "
            f"that LoadGen can make ready in memory; {remedy}"
        )


async def _probed_rate(ask: Ask, inputs: int) -> float:
    """Return about how many samples a second there are when many are asked at once."""
    answered, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < _PROBE_SECONDS:
        await asyncio.gather(*(ask((answered + i) % inputs) for i in range(64)))
        answered += 64
    return answered / spent if spent else float(answered)


def _settings(config: BenchConfig) -> dict[str, int | float | str]:
    runner, policy = config.runner, config.runner.policy(config.tower)
    settings: dict[str, int | float | str] = {
        "instances": runner.instances,
        "threads": runner.threads,
        "preparation_threads": runner.preparation_threads,
        "capacity": runner.capacity,
        "max_batch_size": policy.max_batch_size,
        "max_queue_delay_microseconds": policy.max_queue_delay_microseconds,
    }
    if config.rate is not None:
        settings |= {"rate": config.rate, "bound_ms": config.bound_ms}
    return settings
