"""A server that is asked for more than it can do: what is waited for, what is heard, what it keeps."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from pathlib import Path

from measured_row import Row, measured_row
from serve_loads import Load, h2load_logged, idle, memory_bytes
from serve_requests import TOGETHER, id_lists, v2_json
from serve_started import ours, started

BASE_CALLERS, CALLERS, QUEUE = 32, 64, 32  # the base holds no more rows than the queue, and so sheds none
_TWICE = 2.05  # a little above, since the parts differ


def overload(bundle: Path, seconds: float) -> list[Row]:
    """Twice what it answers, from 64 connections, beside 1,000 that say nothing; in ten parts."""
    with started(ours(bundle, "--queue", str(QUEUE))) as (process, where):
        return asyncio.run(_overloaded(process.pid, where["http"], seconds))


async def _overloaded(pid: int, root: str, seconds: float) -> list[Row]:
    bodies = [v2_json(ids) for ids in id_lists()[:TOGETHER]]

    async def load(callers: int, lasting: float, rate: float | None = None) -> Load:
        ask = functools.partial(h2load_logged, seconds=lasting, callers=callers, rate=rate)
        url, headers = f"{root}/v2/models/text/infer", ["Content-Type: application/json"]
        return await asyncio.to_thread(ask, url, bodies, headers)

    settle = min(10.0, seconds)
    async with idle(root.partition("//")[2], 1000) as quiet:
        usual = await load(BASE_CALLERS, settle)
        rate = _TWICE * usual.rate
        memory = [memory_bytes(pid)]
        parts = []
        for _ in range(10):
            parts.append(await load(CALLERS, seconds / 10, rate))
            memory.append(memory_bytes(pid))
        again = await load(BASE_CALLERS, settle)
        while quiet.open < 1000:  # some may be on their way back
            await asyncio.sleep(0.1)
    shed = usual.statuses.get(429, 0) + again.statuses.get(429, 0)
    base = min(usual.percentile(0.99), again.percentile(0.99))
    statuses = sum((Counter(part.statuses) for part in parts), Counter())
    all_ = Load(
        [latency for part in parts for latency in part.latencies],
        dict(statuses),
        sum(part.seconds for part in parts),
    )
    others = sum(count for status, count in statuses.items() if status not in (200, 429))
    p99, times = all_.percentile(0.99), all_.percentile(0.99) / base
    note = (
        f"{seconds:g} s in ten parts, the median part; {BASE_CALLERS} callers alone get {usual.rate:,.0f} a "
        f"second; asked {all_.asked:,.0f}, {all_.asked / usual.rate:.2f} times that, accepted "
        f"{all_.rate:,.0f}; "
        f"p99 of all accepted {p99 * 1e3:.1f} ms from when it was sent, {times:.2f} times the base's "
        f"{base * 1e3:.1f} ms, the lesser of before and after ({shed} of it shed); h2load asks from "
        f"{CALLERS} connections on a timetable, queue of {QUEUE} rows; statuses {dict(statuses)}"
    )
    silent = f"beside {quiet.open:,} connections that say nothing, opened anew "
    silent += f"{quiet.reopened:,} times when the server had closed them for it"
    return [
        measured_row(
            f"p99 of accepted under overload / p99 of {BASE_CALLERS} callers in circles",
            "times", [part.percentile(0.99) / base for part in parts], 2.0, 1.0, note,
        ),
        measured_row("answers other than 200 and 429", "answers", [float(others)], 0, 0, silent),
        measured_row(
            "memory after / before", "times", [held / memory[0] for held in memory[1:]], 1.05, 1.01,
            f"{memory[0] / 1e6:.0f} MB before, {memory[-1] / 1e6:.0f} MB after {seconds:g} s; "
            "looked at after each part",
        ),
    ]  # fmt: skip
