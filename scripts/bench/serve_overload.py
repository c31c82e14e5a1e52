"""A server that is asked for more than it can do: what is waited for, what is heard, what it keeps."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from serve_loads import Load, http_circle, http_timetable, idle, memory_bytes
from serve_requests import http_request, id_lists, v2_json
from serve_started import Row, ours, row, started

BASE_CALLERS, CALLERS, QUEUE = 32, 64, 32  # the base holds no more rows than the queue, and so sheds none
_TWICE = 2.05  # a little above, since the parts differ
_KEPT = 0.95  # of a timetable, by callers who keep it


def overload(bundle: Path, seconds: float) -> list[Row]:
    """Twice what it answers, from 64 connections, beside 1,000 that say nothing; in ten parts."""
    with started(ours(bundle, "--queue", str(QUEUE))) as (process, where):
        return asyncio.run(_overloaded(process.pid, where["http"].partition("//")[2], seconds))


async def _overloaded(pid: int, address: str, seconds: float) -> list[Row]:
    requests = [http_request(address, "/v2/models/text/infer", v2_json(ids)) for ids in id_lists()]
    settle = min(10.0, seconds)
    async with idle(address, 1000) as quiet:
        usual = await http_circle(address, requests, BASE_CALLERS, settle)
        rate = await _rate_of_twice(address, requests, usual.rate, settle / 2)
        memory = [memory_bytes(pid)]
        parts = []
        for _ in range(10):
            parts.append(await http_timetable(address, requests, CALLERS, rate, seconds / 10))
            memory.append(memory_bytes(pid))
        again = await http_circle(address, requests, BASE_CALLERS, settle)
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
    note = f"{seconds:g} s in ten parts, the median part; asked {all_.asked:,.0f} a second, accepted "
    note += f"{all_.rate:,.0f}: {all_.asked / all_.rate:.2f} times what it answered; p99 of all accepted "
    note += f"{all_.percentile(0.99) * 1e3:.1f} ms from when it was due, {all_.percentile(0.99) / base:.2f} "
    note += f"times the base's {base * 1e3:.1f} ms, the lesser of before and after ({shed} of it shed); "
    if all_.asked < 2 * all_.rate:
        note += "the callers could ask no faster; "
    note += f"{CALLERS} callers ask on a timetable, queue of {QUEUE} rows; statuses {dict(statuses)}"
    silent = f"beside {quiet.open:,} connections that say nothing, opened anew "
    silent += f"{quiet.reopened:,} times when the server had closed them for it"
    return [
        row(
            f"p99 of accepted under overload / p99 of {BASE_CALLERS} callers in circles",
            "times", [part.percentile(0.99) / base for part in parts], 2.0, 1.0, note,
        ),
        row("answers other than 200 and 429", "answers", [float(others)], 0, 0, silent),
        row(
            "memory after / before", "times", [held / memory[0] for held in memory[1:]], 1.05, 1.01,
            f"{memory[0] / 1e6:.0f} MB before, {memory[-1] / 1e6:.0f} MB after {seconds:g} s; "
            "looked at after each part",
        ),
    ]  # fmt: skip


async def _rate_of_twice(address: str, requests: list[bytes], answered: float, seconds: float) -> float:
    """Find the rate at which twice as much is asked as is accepted.

    If the callers themselves cannot ask so fast, that is the fastest timetable that they keep: a later one
    would tell how late they are, and nothing of the server.
    """
    rate = 2 * answered
    for _ in range(6):
        load = await http_timetable(address, requests, CALLERS, rate, seconds)
        if load.asked < _KEPT * rate:
            return _KEPT * load.asked
        if load.asked >= _TWICE * load.rate:
            break
        rate *= 1.1
    return rate
