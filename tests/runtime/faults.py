"""Engines for the runner's tests: they double numbers, and fail where a number tells them to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from edgeglm.engines.fake import FakeEngine
from edgeglm.engines.protocol import Feeds, TensorSpec
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.runner import Runner

POISON, HANG, MISCOUNT, NOT_A_NUMBER = 666.0, 777.0, 888.0, 999.0
WIDTH = 2
LIMIT = 20.0


class Doubler:
    """Makes engines that share one record of calls. ``gate`` holds every call back while it is closed."""

    def __init__(self, *, seconds: float = 0.0, factor: float = 2.0) -> None:
        self.seconds, self.factor = seconds, factor
        self.made: list[FakeEngine] = []
        self.batches: list[list[float]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.released = threading.Event()
        self.entered = threading.Event()
        self.dead: set[FakeEngine] = set()
        self.load_error: Exception | None = None

    def __call__(self) -> FakeEngine:
        if self.load_error is not None:
            raise self.load_error
        engine = FakeEngine(
            inputs=[TensorSpec(name="x", dtype="float32", shape=("B", WIDTH))],
            outputs=[TensorSpec(name="y", dtype="float32", shape=("B", WIDTH))],
            function=lambda feeds: self.function(feeds, engine),
            seconds=self.seconds,
        )
        self.made.append(engine)
        return engine

    def function(self, feeds: Feeds, engine: FakeEngine) -> Sequence[np.ndarray]:
        if engine in self.dead:
            raise RuntimeError("an illegal memory access was encountered")
        values = feeds["x"][:, 0]
        self.batches.append([float(value) for value in values])
        self.entered.set()
        assert self.gate.wait(LIMIT)
        if POISON in values:
            raise RuntimeError("a poisoned sample")
        if HANG in values:
            self.released.wait(LIMIT)
        doubled = feeds["x"] * np.float32(self.factor)
        if MISCOUNT in values:
            return [doubled[:-1]]
        doubled[values == NOT_A_NUMBER] = np.nan
        return [doubled]


def sample(value: float) -> dict[str, np.ndarray]:
    return {"x": np.full(WIDTH, value, np.float32)}


def towers(doubler: Doubler) -> dict[str, TowerSource]:
    return {"double": TowerSource(engine=doubler)}


def runner(doubler: Doubler, **changes: Any) -> Runner:
    settings: dict[str, Any] = {"warm_up": False, "hang_after": 5.0, **changes}
    return Runner(towers(doubler), RunnerConfig(**settings))


async def doubled(served: Runner, value: float, **options: Any) -> float:
    answer = await served.infer("double", sample(value), **options)
    assert answer["y"].shape == (WIDTH,)
    return float(answer["y"][0])


async def held(doubler: Doubler, served: Runner, value: float) -> asyncio.Task[float]:
    """Close the gate, and ask for one answer, whose call the engine is in when this returns."""
    doubler.gate.clear()
    asked = asyncio.create_task(doubled(served, value))
    await until(doubler.entered.is_set)
    return asked


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    for _ in range(int(LIMIT / 0.002)):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not happen in time")


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test in a loop of its own that must end, and complain about whatever the loop reports."""

    async def limited() -> None:
        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
        await asyncio.wait_for(main(), LIMIT)
        assert not reports

    asyncio.run(limited())


async def ended(*work: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*work, return_exceptions=True)
