"""MLPerf LoadGen in front of a runner: it decides when queries come, and whether a run counts.

The scenarios are LoadGen's (mlcommons/inference, ``loadgen/README.md``): single-stream sends the next
query when the last is answered; multi-stream sends 8 samples a query; server sends queries at random
(Poisson) at a wanted rate; offline sends everything at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeglm.bench.measurement import SHORT, Scenario
from edgeglm.core.errors import EdgeglmError, UserError

Ask = Callable[[int], Awaitable[object]]

_NAMES = {
    "single-stream": "SingleStream",
    "multi-stream": "MultiStream",
    "server": "Server",
    "offline": "Offline",
}
SAMPLES_A_QUERY = 8  # MLPerf's own number for multi-stream
_AT_ONCE = 4096  # samples of one query: each that waits for its place keeps kilobytes


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send.

    Attributes:
        scenario: In which manner.
        seconds: For how long at the least.
        inputs: How many different samples there are: ``ask`` gets a number below it.
        rate: Queries a second in the server scenario; for the others the samples a second that are to be
            expected at the most, from which LoadGen decides how many to make ready. It stops when they
            are used up, and calls a run not valid that was shorter than asked.
        bound_ms: The p99 that the server scenario must keep to be valid.
        seed: Of the order and the arrival times.
    """

    scenario: Scenario
    seconds: float
    inputs: int
    rate: float = 0.0
    bound_ms: float = 100.0
    seed: int = 20261124


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What came back. ``latencies_ms`` has one item a query, or a sample in the offline scenario."""

    queries: int
    samples: int
    seconds: float
    latencies_ms: list[float]
    valid: bool
    verdict: str


@dataclass
class _Tally:
    """Books of a run, kept in the event loop."""

    scenario: Scenario
    queries: int = 0
    samples: int = 0
    started: float = 0.0
    ended: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)


async def drive(ask: Ask, load: Load) -> LoadReport:
    """Send a load and wait for its end. ``ask`` is awaited in this event loop, once a sample.

    Raises:
        UserError: LoadGen is not installed.
        EdgeglmError: Samples were not answered; the first one's error is told.
    """
    lib = _loadgen()
    loop = asyncio.get_running_loop()
    tally = _Tally(load.scenario)
    tasks: set[asyncio.Task[None]] = set()

    def begin(query: Sequence[tuple[int, int]], since: float) -> None:
        task = loop.create_task(_answer(lib, ask, tally, query, since))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def issue(samples: Any) -> None:
        # LoadGen's samples have an id and an index and no time: what it waited for the interpreter is lost.
        query, since = [(sample.id, sample.index) for sample in samples], time.perf_counter()
        with contextlib.suppress(RuntimeError):  # the loop is gone: the run was interrupted
            loop.call_soon_threadsafe(begin, query, since)

    with tempfile.TemporaryDirectory() as folder:
        await _started(lib, load, issue, Path(folder))
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text(errors="replace")
    if tally.errors:
        raise EdgeglmError(
            f"{len(tally.errors)} of {tally.samples} samples were not answered, the first because: "
            f"{tally.errors[0]}"
        ) from tally.errors[0]
    valid, verdict = verdict_from_summary(summary)
    if valid and (short := _short(lib, load, tally)):
        valid, verdict = False, short
    return LoadReport(
        queries=tally.queries,
        samples=tally.samples,
        seconds=tally.ended - tally.started,
        latencies_ms=tally.latencies_ms,
        valid=valid,
        verdict=verdict,
    )


def _short(lib: Any, load: Load, tally: _Tally) -> str:
    """Say by how much a run is under LoadGen's own minimum, which ``_settings`` lowers; else nothing."""
    least = lib.TestSettings()
    asked = tally.samples if load.scenario == "offline" else tally.queries
    if asked >= least.min_query_count and load.seconds * 1e3 >= least.min_duration_ms:
        return ""
    return (
        f"{SHORT}: {asked} asked in {load.seconds:g} s, where LoadGen's own minimum is "
        f"{least.min_query_count} in {least.min_duration_ms / 1e3:g} s"
    )


def verdict_from_summary(summary: str) -> tuple[bool, str]:
    """Read LoadGen's summary: whether the run is valid, and its reasons and advice where it is not."""
    lines = [line.strip() for line in summary.splitlines()]
    valid = any(line.replace(" ", "") == "Resultis:VALID" for line in lines)
    reasons = [line.removeprefix("*").strip() for line in lines if line.startswith("*")]
    reasons += [line for line in lines if "satisfied" in line and line.endswith("NO")]
    return valid, "" if valid else "; ".join(reasons)


async def _answer(lib: Any, ask: Ask, tally: _Tally, query: Sequence[tuple[int, int]], since: float) -> None:
    """Ask for the samples of a query, more at once than a runner holds, and tell LoadGen of each answer."""
    tally.started = tally.started or since
    tally.queries += 1

    async def one(identity: int, index: int) -> float:
        try:
            await ask(index)
        except Exception as error:  # LoadGen would wait for ever: it is told, and the run fails at its end
            tally.errors.append(error)
        tally.ended = ended = time.perf_counter()
        tally.samples += 1
        if tally.scenario == "offline" or len(query) == 1:
            tally.latencies_ms.append((ended - since) * 1e3)
        lib.QuerySamplesComplete([lib.QuerySampleResponse(identity, 0, 0)])
        return ended

    if len(query) == 1:
        await one(*query[0])
        return
    turns = iter(query)

    async def some() -> float:
        return max([await one(*sample) for sample in turns], default=since)

    ends = await asyncio.gather(*(some() for _ in range(min(len(query), _AT_ONCE))))
    if tally.scenario != "offline":  # LoadGen has sent the next query by now: that is no part of this one
        tally.latencies_ms.append((max(ends) - since) * 1e3)


async def _started(lib: Any, load: Load, issue: Callable[[Any], None], folder: Path) -> None:
    """Run LoadGen's test in a thread of its own: it blocks, and cannot be stopped."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def test() -> None:
        error: BaseException | None = None
        try:
            under_test = lib.ConstructSUT(issue, _nothing)
            library = lib.ConstructQSL(load.inputs, load.inputs, _ignore, _ignore)
            lib.StartTestWithLogSettings(under_test, library, _settings(lib, load), _logs(lib, folder))
            lib.DestroyQSL(library)
            lib.DestroySUT(under_test)
        except BaseException as caught:  # handed to whoever waits
            error = caught
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=test, name="edgeglm-loadgen", daemon=True).start()
    await done


def _settings(lib: Any, load: Load) -> Any:
    settings = lib.TestSettings()
    settings.scenario = getattr(lib.TestScenario, _NAMES[load.scenario])
    settings.mode = lib.TestMode.PerformanceOnly
    settings.min_duration_ms = max(1, round(load.seconds * 1000))
    settings.min_query_count = 1
    settings.multi_stream_samples_per_query = SAMPLES_A_QUERY
    settings.server_target_latency_ns = round(load.bound_ms * 1e6)
    if load.scenario == "server":
        settings.server_target_qps = load.rate
    elif load.scenario == "offline":
        settings.offline_expected_qps = load.rate
    elif load.rate:
        settings.single_stream_expected_latency_ns = 1e9 / load.rate
        settings.multi_stream_expected_latency_ns = SAMPLES_A_QUERY * 1e9 / load.rate
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = load.seed
    return settings


def _logs(lib: Any, folder: Path) -> Any:
    output = lib.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    logs = lib.LogSettings()
    logs.log_output = output
    logs.enable_trace = False
    return logs


def _nothing() -> None:
    """Flush nothing."""


def _ignore(indices: object) -> None:
    """Load and unload nothing: the samples are in memory."""


def _loadgen() -> Any:
    try:
        return importlib.import_module("mlperf_loadgen")
    except ImportError as error:
        raise UserError(f"cannot import MLPerf LoadGen ({error}); pip install mlcommons-loadgen") from error
