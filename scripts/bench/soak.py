"""A runner under twice its load, with everything that goes wrong: is any request lost, does memory grow?

    .venv/bin/python scripts/bench/soak.py --minutes 30

Requests come at random moments at twice the measured rate. Some are cancelled, alone or with all others
of a client that disconnects; some have deadlines; some make the engine raise; bundles are swapped all
the while. Every answer is compared with the bare engine's. Writes docs/bench/soak.json and soak.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from runner_loads import circle_rate  # noqa: E402
from runner_models import WIDTH, dense_model  # noqa: E402

from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine  # noqa: E402
from edgeglm.engines.protocol import Array, Feeds  # noqa: E402
from edgeglm.runtime.config import RunnerConfig  # noqa: E402
from edgeglm.runtime.contract import TowerSource  # noqa: E402
from edgeglm.runtime.requests import (  # noqa: E402
    DeadlineExceededError,
    EngineFailedError,
    OverloadedError,
    Priority,
)
from edgeglm.runtime.runner import Runner  # noqa: E402

POISON, NOT_FINITE = 666.0, float("nan")
CLIENTS = 32
SWAP_SECONDS = 5.0


class PoisonedEngine(OnnxRuntimeEngine):
    """Raises for a batch that holds a poisoned sample, as a crashing kernel would."""

    def _run(self, feeds: Feeds) -> list[Array]:
        if (feeds["x"][:, 0] == POISON).any():
            raise RuntimeError("poisoned")
        return super()._run(feeds)


class Soak:
    """One run and its books."""

    def __init__(self, path: Path) -> None:
        self.random = np.random.default_rng(7)
        samples = self.random.random((64, WIDTH), dtype=np.float32)
        with OnnxRuntimeEngine(path, threads=1) as engine:
            self.expected = engine.infer({"x": samples})["y"]
        self.samples = [{"x": row} for row in samples]
        self.towers = {"tower": TowerSource(engine=lambda: PoisonedEngine(path, threads=1))}
        self.clients: list[set[asyncio.Task[None]]] = [set() for _ in range(CLIENTS)]
        self.ends: Counter[str] = Counter()
        self.begun = 0
        self.rss: list[float] = []

    async def request(self, runner: Runner, number: int, kind: str, deadline: float | None) -> None:
        """Ask once and book how it ends; an end that does not fit the kind is a fault."""
        index = number % len(self.samples)
        sample = self.samples[index]
        if kind != "good":
            sample = {"x": np.full(WIDTH, POISON if kind == "poisoned" else NOT_FINITE, np.float32)}
        priority = Priority(number % 3)
        try:
            answer = await runner.infer("tower", sample, deadline=deadline, priority=priority)
        except (DeadlineExceededError, OverloadedError) as error:
            self.ends[type(error).__name__] += 1
        except (EngineFailedError, UserError) as error:
            fits = {"poisoned": EngineFailedError, "not finite": UserError}.get(kind)
            self.ends["failed alone" if fits is type(error) else f"WRONG {type(error).__name__}"] += 1
        else:
            near = np.allclose(answer["y"], self.expected[index], rtol=1e-4, atol=1e-4)
            self.ends["answered" if kind == "good" and near else "WRONG answer"] += 1

    def book_cancelled(self, task: asyncio.Task[None]) -> None:
        """Book a cancelled request here: one that was cancelled before its first step never ran."""
        if task.cancelled():
            self.ends["cancelled"] += 1

    async def arrivals(self, runner: Runner, rate: float, seconds: float) -> None:
        """Send requests at random moments."""
        started = due = time.perf_counter()
        while due < started + seconds:
            due += self.random.exponential(1 / rate)
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            draw = self.random.random(4)
            kind = "poisoned" if draw[0] < 0.005 else "not finite" if draw[0] < 0.008 else "good"
            deadline = float(draw[1]) if draw[1] < 0.3 else None
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

    async def swaps(self, runner: Runner) -> None:
        """Swap for ever."""
        while True:
            await asyncio.sleep(SWAP_SECONDS)
            await runner.swap(self.towers)
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
        async with Runner(self.towers, config) as runner:
            rate = await circle_rate(lambda s: runner.infer("tower", s), self.samples, 128, 2.0)
            before = runner.stats()
            others = [asyncio.create_task(work) for work in (self.watch(), self.swaps(runner))]
            await self.arrivals(runner, 2 * rate, seconds)
            others[1].cancel()
            await asyncio.gather(others[1], return_exceptions=True)
        await asyncio.sleep(0)
        lost = sum(len(client) for client in self.clients)
        others[0].cancel()
        stats = runner.stats()
        swaps = self.ends.pop("swaps", 0)
        quarter = max(len(self.rss) // 4, 1)
        early, late = np.mean(self.rss[quarter : 2 * quarter]), np.mean(self.rss[-quarter:])
        return {
            "minutes": round(seconds / 60, 2),
            "rate": round(2 * rate),
            "requests": self.begun,
            "ends": dict(self.ends.most_common()),
            "lost": lost,
            "duplicated": sum(self.ends.values()) + lost - self.begun,
            "wrong": sum(count for end, count in self.ends.items() if end.startswith("WRONG")),
            "books": "balance" if _balanced(stats, before.accepted) else f"do not balance: {stats}",
            "swaps": swaps,
            "replaced": stats.replaced,
            "rss_mb": {"second quarter": round(float(early), 1), "last quarter": round(float(late), 1)},
            "rss_growth": round(float(late / early - 1), 4),
        }


def _balanced(stats: Any, warm: int) -> bool:
    # What is shed at the door was never accepted, nor was what expired before it; both only add ends.
    ended = stats.answered + stats.failed + stats.expired + stats.cancelled + stats.shed
    return stats.held == 0 and stats.waiting == 0 and ended >= stats.accepted >= warm


def markdown(report: Mapping[str, Any]) -> str:
    """Write the report as a page."""
    ends = ", ".join(f"{count:,} {end}" for end, count in report["ends"].items())
    holds = report["lost"] == report["duplicated"] == report["wrong"] == 0
    flat = abs(report["rss_growth"]) <= 0.05
    return f"""# The runner under twice its load

Machine: {report["machine"]}; commit {report["commit"]}; `{report["command"]}`.

| what | found | reach | result |
| --- | --- | --- | --- |
| time | {report["minutes"]:g} min | 30 min | {"reached" if report["minutes"] >= 30 else "falls short"} |
| lost, duplicated, wrong | {report["lost"]}, {report["duplicated"]}, {report["wrong"]} | 0, 0, 0 \
| {"reached" if holds else "falls short"} |
| growth of memory, second to last quarter | {report["rss_growth"]:.1%} | within 5 % \
| {"reached" if flat else "falls short"} |

{report["requests"]:,} requests at {report["rate"]:,} a second, with {report["swaps"]} hot swaps: {ends}.
The runner's own books {report["books"]}.
"""


def main() -> None:
    """Soak, and write both files."""
    parser = argparse.ArgumentParser(description="A runner under twice its load.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "bench" / "soak")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(Soak(dense_model(Path(folder) / "soak.onnx", 12)).run(arguments.minutes * 60))
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
