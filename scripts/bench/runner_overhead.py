"""What a request costs when the engine costs nothing, beside the bare way into a thread and back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from measured_row import Row  # noqa: E402
from runner_loads import FixedDelayBatcher, Rounds, circle_rate, group_seconds  # noqa: E402
from runner_report import row  # noqa: E402

from edgeglm.engines.fake import FakeEngine  # noqa: E402
from edgeglm.engines.protocol import TensorSpec  # noqa: E402
from edgeglm.runtime.config import RunnerConfig  # noqa: E402
from edgeglm.runtime.contract import TowerSource  # noqa: E402
from edgeglm.runtime.runner import Runner  # noqa: E402

BATCH = 32
ROUNDS = 7
SECONDS = 60.0  # for one group to find quiet rounds in
DELAY = 0.005  # seconds that the fixed-delay batcher waits
CALLS = 2000  # of one caller in a round
SAMPLE = {"x": np.ones(8, np.float32)}


def no_op() -> FakeEngine:
    """Make an engine that gives back what it gets."""
    spec = [TensorSpec(name="x", dtype="float32", shape=("B", 8))]
    made = FakeEngine(inputs=spec, outputs=spec, function=lambda feeds: [feeds["x"]])
    made.calls = _Forgetful()
    return made


class _Forgetful(list[Any]):
    def append(self, _: object) -> None:
        """Keep nothing: a benchmark makes many calls."""


class BareThread:
    """The least that there is between a caller and a thread: a queue there, ``call_soon_threadsafe`` back."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[asyncio.Future[None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> BareThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()

    async def ask(self) -> None:
        """Go into the thread and back."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(future)
        await future

    def _work(self) -> None:
        while (future := self._queue.get()) is not None:
            self._loop.call_soon_threadsafe(future.set_result, None)


async def median_us(ask: Callable[[], Awaitable[object]], calls: int = CALLS) -> float:
    """Return the median time of one caller that asks again as soon as it is answered."""
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        await ask()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


async def overhead() -> list[Row]:
    """Measure what a request costs, of many callers and of one."""
    loop = asyncio.get_running_loop()

    async def bare(_: object) -> None:
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        await future

    found: dict[str, list[float]] = {
        name: [] for name in ("added", "peer", "single", "floor", "pinned", "pinned floor")
    }
    async with _pinned() as child:
        rounds = Rounds(ROUNDS, SECONDS, own=lambda: time.process_time() + group_seconds(child.pid))
        with no_op() as engine, BareThread() as thread:
            async with (
                Runner({"tower": TowerSource(engine=no_op)}, RunnerConfig()) as runner,
                FixedDelayBatcher(engine, BATCH, DELAY) as batcher,
            ):

                async def ask(one: Mapping[str, np.ndarray] = SAMPLE) -> object:
                    return await runner.infer("tower", one)

                async for _ in rounds:
                    base = 1 / await circle_rate(bare, [SAMPLE], 64, 0.3)
                    found["added"].append((1 / await circle_rate(ask, [SAMPLE], 64, 0.6) - base) * 1e6)
                    found["peer"].append(
                        (1 / await circle_rate(batcher.infer, [SAMPLE], 64, 0.3) - base) * 1e6
                    )
                    found["single"].append(await median_us(ask))
                    found["floor"].append(await median_us(thread.ask))
                    for name, value in (await _measured_by(child)).items():
                        found[name].append(value)
    return _rows(found, rounds)


def _rows(found: Mapping[str, list[float]], rounds: Rounds) -> list[Row]:
    peer = statistics.median(found["peer"][number] for number in rounds.best())
    added = (
        f"time a request minus that of a bare asyncio future; the fixed-delay ({DELAY * 1e3:g} ms) batcher, "
        f"which checks nothing, adds {peer:.1f}"
    )
    single = f"into the engine's thread and back; the fixed-delay batcher waits {DELAY * 1e6:g} for company"
    floor = (
        "no runner: queue.SimpleQueue into a thread, loop.call_soon_threadsafe back; the machine's own part"
    )
    pinned = "in a process that may use one core only (os.sched_setaffinity), in the same rounds"
    return [
        row(
            "added us a request, engine that does nothing, 64 callers",
            "us",
            found["added"],
            10,
            5,
            added,
            rounds,
        ),
        row("p50 us of one caller, engine that does nothing", "us", found["single"], 60, 35, single, rounds),
        row("floor: p50 us of one caller", "us", found["floor"], None, None, floor, rounds),
        row("p50 us of one caller, pinned to one core", "us", found["pinned"], None, None, pinned, rounds),
        row(
            "floor: p50 us of one caller, pinned to one core",
            "us",
            found["pinned floor"],
            None,
            None,
            pinned,
            rounds,
        ),
    ]


@contextlib.asynccontextmanager
async def _pinned() -> AsyncIterator[Process]:
    """Start this file as a process of its own, which measures each time it is sent a line."""
    command = (sys.executable, str(Path(__file__).resolve()))
    child = await create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True)
    assert child.stdin is not None
    try:
        yield child
    finally:
        child.stdin.close()
        await child.wait()


async def _measured_by(child: Process) -> dict[str, float]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"\n")
    await child.stdin.drain()
    answer: dict[str, float] = json.loads(await child.stdout.readline())
    return answer


async def _measure_pinned() -> None:
    """Measure on one core whenever a line comes; nothing of this process runs in between."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with BareThread() as thread:
        async with Runner({"tower": TowerSource(engine=no_op)}, RunnerConfig()) as runner:
            while sys.stdin.readline():
                single = await median_us(lambda: runner.infer("tower", SAMPLE))
                floor = await median_us(thread.ask)
                sys.stdout.write(json.dumps({"pinned": single, "pinned floor": floor}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_measure_pinned())
