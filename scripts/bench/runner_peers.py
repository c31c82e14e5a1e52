"""Servers of Python models with an engine that does nothing, beside the runner."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from measured_row import Row
from runner_loads import HttpCaller, Rounds, circle_rate, group_seconds
from runner_overhead import ROUNDS, SECONDS, no_op
from runner_report import row
from serve_started import free_port

from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.runner import Runner

HERE = Path(__file__).resolve().parent


async def peers(binaries: Path) -> list[Row]:
    """Measure LitServe and BentoML, as ``overhead`` measures the runner.

    Args:
        binaries: The ``bin`` of an environment that has both, made by these two lines:
            ``python -m venv PEERS`` and ``PEERS/bin/pip install -r scripts/bench/serve-peers.txt``.
    """
    port = str(free_port())
    lit = [str(binaries / "python"), str(HERE / "runner_litserve.py"), port]
    rows = [await _beside("LitServe", lit, int(port), "/predict", {"x": [1.0] * 8})]
    port = str(free_port())
    bento = [str(binaries / "bentoml"), "serve", "runner_bentoml:NoOp", "--port", port]
    rows.append(await _beside("BentoML", bento, int(port), "/predict", {"x": [[1.0] * 8]}))
    return rows


async def _beside(name: str, command: Sequence[str], port: int, path: str, body: object) -> Row:
    sample = {"x": np.ones(8, np.float32)}
    callers = [HttpCaller(port, path, json.dumps(body).encode()) for _ in range(64)]
    ratios: list[float] = []
    costs: list[float] = []
    with _started(command) as server:
        for caller in callers:
            await caller.open()
        for _ in range(120):  # connected is not yet ready
            try:
                await callers[0].ask()
                break
            except ValueError:
                await asyncio.sleep(0.5)
        rounds = Rounds(ROUNDS, SECONDS, own=lambda: time.process_time() + group_seconds(server.pid))
        async with Runner({"tower": TowerSource(engine=no_op)}, RunnerConfig()) as runner:
            async for _ in rounds:
                theirs = await _http_rate(callers, 1.0)
                ours = await circle_rate(lambda s: runner.infer("tower", s), [sample], 64, 0.5)
                ratios.append(ours / theirs)
                costs.append(1e6 / theirs)
    note = (
        f"{name} takes {statistics.median(costs):.0f} us a request; it comes with HTTP, JSON and a process "
        "of its own, the runner is called in process"
    )
    title = f"requests a second / {name}'s, engine that does nothing, 64 callers"
    return row(title, "ratio", ratios, 1, 10, note, rounds)


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a process group of its own, and end all of the group."""
    server = subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield server
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


async def _http_rate(callers: Sequence[HttpCaller], seconds: float) -> float:
    started, answered = time.perf_counter(), 0

    async def ask_on(caller: HttpCaller) -> None:
        nonlocal answered
        while time.perf_counter() - started < seconds:
            await caller.ask()
            answered += 1

    await asyncio.gather(*(ask_on(caller) for caller in callers))
    return answered / (time.perf_counter() - started)
