"""Callers of a server: in circles or on a timetable, over HTTP with bytes made beforehand, or over gRPC."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import Any

_LENGTH = b"\r\ncontent-length: "


@dataclass
class Load:
    """What callers saw: seconds of each accepted answer, and how often each status came."""

    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Accepted answers a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """A latency in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


async def http_circle(address: str, request: bytes, callers: int, seconds: float) -> Load:
    """Let each caller ask again as soon as it has its answer."""
    load = Load()
    began = time.perf_counter()

    async def call() -> None:
        reader, writer = await _connected(address)
        while time.perf_counter() < began + seconds:
            await _ask(reader, writer, request, load)
        writer.close()

    await asyncio.gather(*(call() for _ in range(callers)))
    load.seconds = time.perf_counter() - began
    return load


async def http_timetable(address: str, request: bytes, callers: int, rate: float, seconds: float) -> Load:
    """Ask ``rate`` times a second, spread over callers; one that is late asks at once."""
    load = Load()
    began = time.perf_counter()

    async def call(number: int) -> None:
        reader, writer = await _connected(address)
        due = began + number / rate
        while due < began + seconds:
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            await _ask(reader, writer, request, load)
            due += callers / rate
        writer.close()

    await asyncio.gather(*(call(number) for number in range(callers)))
    load.seconds = time.perf_counter() - began
    return load


async def grpc_circle(address: str, request: bytes, callers: int, seconds: float) -> Load:
    """Let each caller of one channel ask again as soon as it has its answer."""
    import grpc

    load = Load()
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        await method(request)
        began = time.perf_counter()

        async def call() -> None:
            while (asked := time.perf_counter()) < began + seconds:
                await method(request)
                load.latencies.append(time.perf_counter() - asked)

        await asyncio.gather(*(call() for _ in range(callers)))
        load.seconds = time.perf_counter() - began
    return load


async def idle(address: str, count: int) -> list[asyncio.StreamWriter]:
    """Open connections that say nothing."""
    return [(await _connected(address))[1] for _ in range(count)]


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _connected(address: str) -> Any:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _ask(reader: Any, writer: Any, request: bytes, load: Load) -> None:
    asked = time.perf_counter()
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.partition(_LENGTH)[2].partition(b"\r\n")[0]))
    status = int(head[9:12])
    load.statuses[status] = load.statuses.get(status, 0) + 1
    if status == 200:
        load.latencies.append(time.perf_counter() - asked)
