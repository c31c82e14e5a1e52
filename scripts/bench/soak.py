"""A runner under twice its load, with everything that goes wrong: is any request lost, does memory grow?

    .venv/bin/python scripts/bench/soak.py --minutes 30

Requests for arrays, texts and pictures come at random moments, at twice the rate that was answered lately on
a machine that may have other work. Some are cancelled,
alone or with all others of a client that disconnects; some have deadlines; some make the engine raise, a few
make it hang; two sets of towers with weights of their own are swapped all the while. Every answer is compared
with that of the bare engine in service, of either set if a swap came between, and the runner's books with
what was asked. Writes docs/bench/soak.json and soak.md; not below docs from a tree with changes, unless
`--allow-dirty` says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from runner_loads import circle_rate  # noqa: E402
from runner_report import check_publishable, commit_of  # noqa: E402
from soak_towers import COUNT, HANG, NOT_FINITE, POISON, FaultyEngine, Served  # noqa: E402

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.runtime.config import RunnerConfig  # noqa: E402
from edgeglm.runtime.ledger import RunnerStats  # noqa: E402
from edgeglm.runtime.requests import (  # noqa: E402
    DeadlineExceededError,
    EngineFailedError,
    OverloadedError,
    Priority,
)
from edgeglm.runtime.runner import Runner  # noqa: E402

CLIENTS = 32
SWAP_SECONDS = 5.0
HANG_EVERY = 60.0  # seconds between hung calls, in the mean
LATEST = 0.5  # seconds by which arrivals may lag
TOWERS = ("tower",) * 8 + ("text", "image")  # in turn: who is asked


class Soak:
    """One run and its books."""

    def __init__(self, folder: Path) -> None:
        self.random = np.random.default_rng(7)
        self.served = Served(folder)
        self.clients: list[set[asyncio.Task[None]]] = [set() for _ in range(CLIENTS)]
        self.ends: Counter[str] = Counter()
        self.begun = self.entered = self.sent_to_hang = self.serving = 0
        self.rate = 1.0
        self.rates: list[float] = []
        self.rss: list[float] = []

    async def asked(self, runner: Runner, number: int, kind: str, **options: Any) -> tuple[str, Any]:
        """Ask once; return the tower and its answer."""
        tower, index = TOWERS[number % len(TOWERS)], number % COUNT
        if kind != "good":
            value = {"poisoned": POISON, "not finite": NOT_FINITE, "hung": HANG}[kind]
            return "tower", (await runner.infer("tower", self.served.odd(value), **options))["y"]
        given = self.served.inputs[tower][index]
        if tower == "text":
            return tower, await runner.embed_text(given, **options)
        if tower == "image":
            return tower, await runner.embed_image(given, **options)
        return tower, (await runner.infer("tower", given, **options))["y"]

    async def request(self, runner: Runner, number: int, kind: str, deadline: float | None) -> None:
        """Ask once and book how it ends; an end that does not fit the kind is a fault."""
        self.entered += 1
        before = self.serving
        try:
            tower, answer = await self.asked(
                runner, number, kind, deadline=deadline, priority=Priority(number % 3)
            )
        except (DeadlineExceededError, OverloadedError) as error:
            self.ends[type(error).__name__] += 1
        except (EngineFailedError, UserError) as error:
            fits = {"poisoned": EngineFailedError, "not finite": UserError}.get(kind)
            if "did not return within" in str(error):
                self.ends["failed with a hung call"] += 1
            else:
                self.ends["failed alone" if fits is type(error) else f"WRONG {type(error).__name__}"] += 1
        else:
            near = kind == "good" and self.served.fits({before, self.serving}, tower, number % COUNT, answer)
            self.ends["answered" if near else "WRONG answer"] += 1

    def book_cancelled(self, task: asyncio.Task[None]) -> None:
        """Book a cancelled request here: one that was cancelled before its first step never ran."""
        if task.cancelled():
            self.ends["cancelled"] += 1

    async def arrivals(self, runner: Runner, rate: float, seconds: float) -> None:
        """Send requests at random moments, ``rate`` a second at first, then what ``paced`` says."""
        self.rate = rate
        due = time.perf_counter()
        until, next_hang = due + seconds, due + self.random.exponential(HANG_EVERY)
        while due < until:
            due += self.random.exponential(1 / self.rate)
            wait = due - time.perf_counter()
            if wait > 0 or self.begun % 32 == 0:
                await asyncio.sleep(max(wait, 0))
            if wait < -LATEST:  # the process was not let run: that time is no part of the soak
                due, until, next_hang = due - wait, until - wait, next_hang - wait
            draw = self.random.random(4)
            kind = "poisoned" if draw[0] < 0.005 else "not finite" if draw[0] < 0.008 else "good"
            deadline = float(draw[1]) if draw[1] < 0.3 else None
            if due > next_hang:
                kind, deadline, next_hang = "hung", None, due + self.random.exponential(HANG_EVERY)
                self.sent_to_hang += 1
            client = self.clients[self.begun % CLIENTS]
            task = asyncio.create_task(self.request(runner, self.begun, kind, deadline))
            self.begun += 1
            client.add(task)
            task.add_done_callback(client.discard)
            task.add_done_callback(self.book_cancelled)
            if draw[2] < 0.05:
                asyncio.get_running_loop().call_later(float(draw[3]) * 0.1, task.cancel)
            elif draw[2] < 0.051:
                for other in tuple(client):
                    other.cancel()

    async def paced(self, runner: Runner) -> None:
        """Keep the load at twice what was answered in the best period of the last minute."""
        answered: deque[float] = deque([self.rate / 2], maxlen=round(60 / SWAP_SECONDS))
        while True:
            before, since = runner.stats().answered, time.perf_counter()
            await asyncio.sleep(SWAP_SECONDS)
            answered.append((runner.stats().answered - before) / (time.perf_counter() - since))
            self.rate = 2 * max(answered)
            self.rates.append(self.rate)

    async def swaps(self, runner: Runner) -> None:
        """Swap for ever, from one generation to the other."""

        def switched() -> None:
            self.serving = 1 - self.serving

        while True:
            await asyncio.sleep(SWAP_SECONDS)
            await runner.swap(self.served.generations[1 - self.serving].towers, switched=switched)
            self.ends["swaps"] += 1

    async def watch(self) -> None:
        """Note the memory twice a second."""
        while True:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.rss.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
            await asyncio.sleep(0.5)

    async def run(self, seconds: float) -> dict[str, Any]:
        """Soak, and sum up."""
        config = RunnerConfig(capacity=256, when_full="shed")
        async with Runner(self.served.generations[0].towers, config) as runner:
            turns = [{"turn": np.array(number)} for number in range(10 * COUNT)]
            rate = await circle_rate(lambda s: self.asked(runner, int(s["turn"]), "good"), turns, 128, 3.0)
            before = runner.stats()
            self.rate = 2 * rate
            works = (self.watch(), self.swaps(runner), self.paced(runner))
            others = [asyncio.create_task(work) for work in works]
            await self.arrivals(runner, 2 * rate, seconds)
            for task in others[1:]:
                task.cancel()
            await asyncio.gather(*others[1:], return_exceptions=True)
        await asyncio.sleep(0)
        lost = sum(len(client) for client in self.clients)
        others[0].cancel()
        stats = runner.stats()
        swaps = self.ends.pop("swaps", 0)
        quarter = max(len(self.rss) // 4, 1)
        early, late = np.mean(self.rss[quarter : 2 * quarter]), np.mean(self.rss[-quarter:])
        return {
            "minutes": round(seconds / 60, 2),
            "rate": round(float(np.median(self.rates or [self.rate]))),
            "requests": self.begun,
            "ends": dict(self.ends.most_common()),
            "lost": lost,
            "duplicated": sum(self.ends.values()) + lost - self.begun,
            "wrong": sum(count for end, count in self.ends.items() if end.startswith("WRONG")),
            "books": _books(stats, before, self.entered, self.ends),
            "swaps": swaps,
            "hangs": len(FaultyEngine.hung),
            "sent_to_hang": self.sent_to_hang,
            "replaced": stats.replaced,
            "rss_mb_each_minute": [round(mb, 1) for mb in self.rss[::120]],
            "rss_mb": {"second quarter": round(float(early), 1), "last quarter": round(float(late), 1)},
            "rss_growth": round(float(late / early - 1), 4),
        }


def _books(stats: RunnerStats, before: RunnerStats, asked: int, ends: Mapping[str, int]) -> str:
    """Say whether the runner counted each request once, and as its caller saw it end.

    An answer that came in the moment of a cancellation is an answer to the runner only; so is an expiry.
    """
    ended = stats.answered + stats.failed + stats.expired + stats.cancelled + stats.shed
    taken = stats.accepted + stats.turned_away
    if stats.held or stats.waiting or ended != taken:
        return f"do not balance: {stats}"
    if taken - before.accepted - before.turned_away != asked:
        return f"hold {taken - before.accepted - before.turned_away} requests and {asked} were made"
    seen = {
        "answered": (stats.answered - before.answered, ends["answered"]),
        "shed": (stats.shed, ends["OverloadedError"]),
        "expired": (stats.expired, ends["DeadlineExceededError"]),
        "failed": (stats.failed, ends["failed alone"] + ends["failed with a hung call"]),
    }
    odd = sum(mine - theirs for mine, theirs in seen.values())
    if any(mine < theirs for mine, theirs in seen.values()) or odd > ends["cancelled"]:
        return f"disagree with the callers: {seen}"
    return f"balance, request by request ({odd:,} were cancelled with their end at hand)"


def markdown(report: Mapping[str, Any]) -> str:
    """Write the report as a page."""
    ends = ", ".join(f"{count:,} {end}" for end, count in report["ends"].items())
    holds = report["lost"] == report["duplicated"] == report["wrong"] == 0
    books = "reached" if report["books"].startswith("balance") else "falls short: the books disagree"
    flat = abs(report["rss_growth"]) <= 0.05
    rss = report["rss_mb"]
    return f"""# The runner under twice its load

Machine: {report["machine"]}; commit {report["commit"]}; `{report["command"]}`.

| what | found | reach | result |
| --- | --- | --- | --- |
| time | {report["minutes"]:g} min | 30 min | {"reached" if report["minutes"] >= 30 else "falls short"} |
| lost, duplicated, wrong | {report["lost"]}, {report["duplicated"]}, {report["wrong"]} | 0, 0, 0 \
| {books if holds else "falls short"} |
| growth of memory, second to last quarter | {report["rss_growth"]:.1%} | within 5 % \
| {"reached" if flat else "falls short"} |

{report["requests"]:,} requests at {report["rate"]:,} a second for arrays, texts and pictures, with \
{report["swaps"]} hot swaps between two sets of weights and \
{report["hangs"]} calls that hung, of \
{report["sent_to_hang"]} requests sent to hang \
({report["replaced"]} instances replaced): \
{ends}. \
{rss["second quarter"]:g} MB in the second quarter, {rss["last quarter"]:g} in the last.
The runner's own books {report["books"]}. Its settings are the default ones but for `capacity` (256) and
`when_full` (shed).
"""


def main() -> None:
    """Soak, and write both files."""
    parser = argparse.ArgumentParser(description="A runner under twice its load.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "bench" / "soak")
    parser.add_argument("--allow-dirty", action="store_true", help="Publish figures of a changed tree.")
    arguments = parser.parse_args()
    check_publishable(ROOT, arguments.output, allow_dirty=arguments.allow_dirty)
    commit = commit_of(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(Soak(Path(folder)).run(arguments.minutes * 60))
    report = {
        "command": f".venv/bin/python scripts/bench/soak.py --minutes {arguments.minutes:g}",
        "commit": commit,
        "machine": f"{os.cpu_count()} shared {platform.machine().replace('_', '-')} CPU cores",
        **found,
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(report))
    sys.stdout.write(markdown(report))


if __name__ == "__main__":
    main()
