"""Loads for the runner and its peers: a bare loop, callers in a circle, and random arrivals."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeglm.engines.protocol import Array, Engine

Sample = Mapping[str, Array]
Ask = Callable[[Sample], Awaitable[object]]


QUIET = 0.15


@dataclass
class Rounds:
    """Rounds of a measurement on a machine with other tenants: the quietest count.

    Yields round numbers until ``wanted`` rounds saw others take at most ``QUIET`` of all cores, or the
    time is up; after a loud one it rests. ``best`` then picks the quietest ``wanted`` of all. ``own`` tells
    the CPU seconds of what is measured: of this process, unless it measures others.
    """

    wanted: int
    seconds: float
    own: Callable[[], float] = time.process_time
    shares: list[float] = field(default_factory=list)

    async def __aiter__(self) -> AsyncIterator[int]:
        """Yield the number of each round."""
        until = time.monotonic() + self.seconds
        while len(self.shares) < self.wanted or (
            time.monotonic() < until and sum(share <= QUIET for share in self.shares) < self.wanted
        ):
            busy, idle, own, started = *_ticks(), self.own(), time.monotonic()
            yield len(self.shares)
            busy_after, idle_after = _ticks()
            total = busy_after - busy + idle_after - idle
            mine = (self.own() - own) * os.sysconf("SC_CLK_TCK")
            self.shares.append(min(1.0, max(0.0, (busy_after - busy - mine) / max(total, 1))))
            if self.shares[-1] > QUIET and started < until:
                await asyncio.sleep(2.0)

    def best(self) -> list[int]:
        """Return the numbers of the quietest rounds."""
        return sorted(range(len(self.shares)), key=self.shares.__getitem__)[: self.wanted]

    def others(self) -> float:
        """Return the largest share of all cores that others took in the rounds that count."""
        return round(max(self.shares[number] for number in self.best()), 2)


def _ticks() -> tuple[int, int]:
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, idle


def group_seconds(session: int) -> float:
    """Return the CPU seconds that the living processes of a session have used."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def raw_rate(engine: Engine, feeds: Sequence[Mapping[str, Array]], samples: int, seconds: float) -> float:
    """Call the session in a bare loop, feeds ready-made: samples a second. The most there can be."""
    session: Any = engine._session  # type: ignore[attr-defined] # the bare one, for comparison
    calls, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or calls % len(feeds):
        session.run(None, feeds[calls % len(feeds)])
        calls += 1
    return calls * samples / len(feeds) / spent


async def circle_rate(ask: Ask, samples: Sequence[Sample], callers: int, seconds: float) -> float:
    """Let ``callers`` ask again as soon as they are answered: samples a second."""
    started = time.perf_counter()
    answered = 0

    async def caller(number: int) -> None:
        nonlocal answered
        turn = number
        while time.perf_counter() - started < seconds:
            await ask(samples[turn % len(samples)])
            answered += 1
            turn += callers

    await asyncio.gather(*(caller(number) for number in range(callers)))
    return answered / (time.perf_counter() - started)


async def poisson_p99(ask: Ask, samples: Sequence[Sample], rate: float, seconds: float, seed: int) -> float:
    """Send at random moments, ``rate`` a second, whatever comes back: the p99 in seconds.

    A request's time counts from when it should have been sent, so that a late sender hides nothing.
    """
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds)))
    latencies: list[float] = []
    tasks: set[asyncio.Task[None]] = set()  # those in flight: ended ones would be work for the collector

    async def one(sample: Sample, due: float) -> None:
        await ask(sample)
        latencies.append(time.perf_counter() - due)

    started = time.perf_counter() + 0.01
    for i, moment in enumerate(arrivals):
        wait = started + moment - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(samples[i % len(samples)], started + moment))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return float(np.percentile(latencies, 99))


class FixedDelayBatcher:
    """The batcher that everybody writes first: wait for a full batch or a fixed delay, then run it."""

    def __init__(self, engine: Engine, max_batch: int, delay: float) -> None:
        self._engine, self._max, self._delay = engine, max_batch, delay
        self._queue: asyncio.Queue[tuple[Sample, asyncio.Future[dict[str, Array]]]] = asyncio.Queue()
        self._pool = ThreadPoolExecutor(1)

    async def __aenter__(self) -> FixedDelayBatcher:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        self._pool.shutdown()

    async def infer(self, sample: Sample) -> dict[str, Array]:
        """Return the outputs of one sample."""
        future: asyncio.Future[dict[str, Array]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((sample, future))
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            until = loop.time() + self._delay
            while len(batch) < self._max:
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), until - loop.time()))
                except asyncio.TimeoutError:
                    break
            feeds = {name: np.stack([sample[name] for sample, _ in batch]) for name in batch[0][0]}
            outputs = await loop.run_in_executor(self._pool, self._engine.infer, feeds)
            for row, (_, future) in enumerate(batch):
                if not future.done():
                    future.set_result({name: array[row] for name, array in outputs.items()})


class HttpCaller:
    """One caller of a server over a connection that stays open."""

    def __init__(self, port: int, path: str, body: bytes) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._port = port
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def open(self) -> None:
        """Connect; wait for a server that is still starting."""
        for _ in range(120):
            try:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
                return
            except OSError:
                await asyncio.sleep(0.5)
        raise TimeoutError("the server did not start")

    async def ask(self) -> None:
        """Send the request and read the whole answer; raises ValueError unless it is 200."""
        self._writer.write(self._request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise ValueError(head.decode(errors="replace"))
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        await self._reader.readexactly(int(fields[b"content-length"]))
