"""Callers of a server: in circles or on a timetable, with bytes made beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LENGTH = b"\r\ncontent-length: "


@dataclass
class Load:
    """What callers saw: seconds of each accepted answer, and how often each status came."""

    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def asked(self) -> float:
        """Requests a second, whatever they were answered."""
        return sum(self.statuses.values()) / self.seconds

    @property
    def rate(self) -> float:
        """Accepted answers a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """A latency in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


async def http_circle(address: str, requests: Sequence[bytes], callers: int, seconds: float) -> Load:
    """Let each caller ask again as soon as it has its answer; they take the requests in turn."""
    load, turn = Load(), itertools.cycle(requests)
    began = time.perf_counter()

    async def call() -> None:
        reader, writer = await _connected(address)
        while time.perf_counter() < began + seconds:
            await _ask(reader, writer, next(turn), load, time.perf_counter())
        writer.close()

    await asyncio.gather(*(call() for _ in range(callers)))
    load.seconds = time.perf_counter() - began
    return load


def h2load_logged(
    url: str,
    bodies: Sequence[bytes],
    headers: Sequence[str],
    *,
    seconds: float,
    callers: int,
    rate: float | None = None,
) -> Load:
    """Ask over HTTP/1.1 and read each answer's status and time from h2load's log.

    With a ``rate`` each caller asks on a timetable, its share of so many requests a second; without, again as
    soon as it has its answer. A compiled caller keeps a timetable on cores that it shares with the server. An
    answer's time counts from when its request is sent: a caller who still waits for the answer before sends
    late, and the load asked is then below the rate.
    """
    each = callers // len(bodies)
    assert each * len(bodies) == callers, "give each body as many callers"
    load = Load(seconds=seconds)
    with tempfile.TemporaryDirectory() as folder:
        running, logs = [], []
        for number, body in enumerate(bodies):
            file, log = Path(folder, str(number)), Path(folder, f"{number}.log")
            file.write_bytes(body)
            logs.append(log)
            command = ["h2load", "--h1", "-c", str(each), "-t", "1", "-D", f"{seconds * 1e3:.0f}ms"]
            command += ["-d", str(file), f"--log-file={log}"]
            command += [f"--rps={rate / callers:.3f}"] if rate is not None else []
            for header in headers:
                command += ["-H", header]
            running.append(subprocess.Popen([*command, url], stdout=subprocess.DEVNULL))
        if any(process.wait() for process in running):
            raise RuntimeError("h2load failed")
        for log in logs:
            for line in log.read_text().splitlines():
                _, status, micros = line.split("\t")[:3]
                load.statuses[int(status)] = load.statuses.get(int(status), 0) + 1
                if status == "200":
                    load.latencies.append(int(micros) / 1e6)
    return load


def h2load_rate(
    url: str,
    bodies: Sequence[bytes],
    headers: Sequence[str],
    *,
    seconds: float,
    callers: int,
    grpc: bool = False,
    least: int = 200,
) -> tuple[float, int]:
    """Return the answers a second, and how many, that nghttp2's h2load gets.

    Each caller asks again when it has its answer. A compiled caller takes little of the cores that
    it shares with the servers. h2load sends one body, so there is one of it for each. Over HTTP/1.1
    each caller has a connection, over gRPC all of one h2load share one, as clients of either do.

    Args:
        url: What is asked.
        bodies: What is sent; their number divides that of the callers.
        headers: ``Name: value``.
        seconds: How long.
        callers: How many.
        grpc: Whether it is a message of gRPC's; one that is refused has an answer without data.
        least: Bytes that a good answer has.

    Raises:
        RuntimeError: Not every answer was a good one.
    """
    each = callers // len(bodies)
    assert each * len(bodies) == callers, "give each body as many callers"
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, body in enumerate(bodies):
            file = Path(folder, str(number))
            file.write_bytes(b"\0" + struct.pack(">I", len(body)) + body if grpc else body)
            ways = ["-c", "1", "-m", str(each)] if grpc else ["--h1", "-c", str(each)]
            command = ["h2load", *ways, "-t", "1", "-D", f"{seconds * 1e3:.0f}ms", "-d", str(file)]
            for header in headers:
                command += ["-H", header]
            running.append(subprocess.Popen([*command, url], stdout=subprocess.PIPE, text=True))
        found = [_told(process.communicate()[0], least) for process in running]
    return sum(rate for rate, _ in found), sum(done for _, done in found)


def _told(said: str, least: int) -> tuple[float, int]:
    done, bad = (int(_found(said, word)) for word in (r"(\d+) done", r"(\d+) failed"))
    good = int(_found(said, r"status codes: (\d+) 2xx"))
    data = int(_found(said, r"\((\d+)\) data"))
    if bad or not 0 < done <= good or data < done * least:
        raise RuntimeError(f"not every answer was a good one: {said}")
    return float(_found(said, r"([\d.]+) req/s")), done


def _found(said: str, pattern: str) -> str:
    match = re.search(pattern, said)
    if match is None:
        raise RuntimeError(f"h2load said something else: {said}")
    return match[1]


@dataclass
class Quiet:
    """Connections that say nothing: how many are open, and how often one was opened again."""

    open: int = 0
    reopened: int = 0


@asynccontextmanager
async def idle(address: str, count: int) -> AsyncIterator[Quiet]:
    """Hold connections that say nothing; one that the server closes for its silence is opened again."""
    quiet = Quiet()

    async def hold() -> None:
        while True:
            reader, writer = await _connected(address)
            quiet.open += 1
            try:
                await reader.read()
            finally:
                quiet.open -= 1
                writer.close()
            quiet.reopened += 1

    holding = [asyncio.ensure_future(hold()) for _ in range(count)]
    while quiet.open < count:
        await asyncio.sleep(0.1)
    try:
        yield quiet
    finally:
        last = Quiet(quiet.open, quiet.reopened)
        for task in holding:
            task.cancel()
        await asyncio.gather(*holding, return_exceptions=True)
        quiet.open, quiet.reopened = last.open, last.reopened


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tree_cpu_seconds(first: int) -> float:
    """Processor time so far of a process and all that descend from it, whatever sessions they began."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid] = int(fields[1])
            used[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    total = 0.0
    for pid, seconds in used.items():
        above = pid
        while above not in (first, 0):
            above = parents.get(above, 0)
        total += seconds if above == first else 0.0
    return total


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _connected(address: str) -> Any:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _ask(reader: Any, writer: Any, request: bytes, load: Load, since: float) -> None:
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.partition(_LENGTH)[2].partition(b"\r\n")[0]))
    status = int(head[9:12])
    load.statuses[status] = load.statuses.get(status, 0) + 1
    if status == 200:
        load.latencies.append(time.perf_counter() - since)
