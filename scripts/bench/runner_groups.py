"""What the runner keeps of an engine's speed, and what length buckets save."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from measured_row import Row
from runner_loads import FixedDelayBatcher, Rounds, circle_rate, raw_rate
from runner_models import VOCABULARY, WIDTH, dense_model, picture_model, text_model
from runner_overhead import BATCH, DELAY, ROUNDS, SECONDS
from runner_report import row

from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.runner import Runner
from edgeglm.runtime.towers import default_length_buckets

MAX_LENGTH = 32


def source(path: Path, threads: int) -> TowerSource:
    """Serve an ONNX file as a tower that takes arrays."""
    return TowerSource(engine=lambda: OnnxRuntimeEngine(path, threads=threads))


def deep_enough(
    make: Callable[[int], Path], name: str, shape: tuple[int, ...], threads: int, least_ms: float
) -> Path:
    """Return a model that is just so deep that a full batch takes ``least_ms`` on this machine."""
    feeds = [{name: np.zeros((BATCH, *shape), np.float32)}]
    depth = 1
    while True:
        path = make(depth)
        with OnnxRuntimeEngine(path, threads=threads) as engine:
            raw_rate(engine, feeds, BATCH, 0.2)
            took = BATCH / raw_rate(engine, feeds, BATCH, 0.5) * 1e3
        if took >= least_ms:
            return path
        depth = max(depth + 1, int(depth * least_ms / took))


async def throughput(folder: Path, threads: int) -> list[Row]:
    """Measure what callers in a circle get of what a bare loop gets.

    Depths are chosen on the machine, so that calls take what the rows say: short ones are measured at both
    ends of what they may take, and between.
    """
    rng = np.random.default_rng(1)

    def dense(depth: int) -> Path:
        return dense_model(folder / f"dense{depth}.onnx", depth)

    def picture(depth: int) -> Path:
        return picture_model(folder / f"picture{depth}.onnx", 64, 24, depth)

    long, short = (0.97, 0.99), (0.8, 0.9)
    cases = [
        ("throughput / raw, calls of 3 ms and more", dense, "x", (WIDTH,), 3.0, long),
        ("throughput / raw, calls of 0.2 to 1 ms: the shortest", dense, "x", (WIDTH,), 0.2, short),
        ("throughput / raw, calls of 0.2 to 1 ms: in the middle", dense, "x", (WIDTH,), 0.5, short),
        ("throughput / raw, calls of 0.2 to 1 ms: the longest", dense, "x", (WIDTH,), 0.9, short),
        (
            "throughput / raw, calls of 3 ms and more, 49 kB a sample",
            picture,
            "pixels",
            (3, 64, 64),
            3.0,
            long,
        ),
    ]
    found = []
    for title, make, name, shape, least_ms, reach in cases:
        path = deep_enough(make, name, shape, threads, least_ms)
        samples = [{name: rng.random(shape, dtype=np.float32)} for _ in range(BATCH)]
        feeds = {name: np.stack([sample[name] for sample in samples])}
        ratios, peers, calls = [], [], []
        rounds = Rounds(ROUNDS, SECONDS)
        with OnnxRuntimeEngine(path, threads=threads) as engine:
            async with (
                Runner({"tower": source(path, threads)}, RunnerConfig()) as runner,
                FixedDelayBatcher(engine, BATCH, DELAY) as batcher,
            ):
                asks: dict[str, Any] = {
                    "runner": lambda s, to=runner: to.infer("tower", s),
                    "fixed delay": batcher.infer,
                }
                await circle_rate(asks["runner"], samples, 4 * BATCH, 0.2)
                async for turn in rounds:
                    rates = {}
                    for system in ("raw", *asks)[:: 1 if turn % 2 else -1]:
                        if system == "raw":
                            rates[system] = raw_rate(engine, [feeds], BATCH, 0.5)
                        else:
                            rates[system] = await circle_rate(asks[system], samples, 4 * BATCH, 0.5)
                    ratios.append(rates["runner"] / rates["raw"])
                    peers.append(rates["fixed delay"] / rates["raw"])
                    calls.append(BATCH / rates["raw"] * 1e3)
        peer = statistics.median(peers[number] for number in rounds.best())
        note = (
            f"batch {BATCH}, a raw call takes {statistics.median(calls):.2f} ms, {4 * BATCH} callers, "
            f"{threads} thread(s) each; the fixed-delay ({DELAY * 1e3:g} ms) batcher, which checks nothing, "
            f"keeps {peer:.3f}"
        )
        found.append(row(title, "ratio", ratios, *reach, note, rounds))
    return found


async def lengths(folder: Path, threads: int) -> list[Row]:
    """Measure what length buckets save on texts of many lengths."""
    path = text_model(folder / "text.onnx", 2)
    rng = np.random.default_rng(3)
    sizes = np.clip(np.rint(rng.lognormal(np.log(11), 0.5, 512)), 3, MAX_LENGTH).astype(int)
    samples = [
        {"input_ids": rng.integers(0, VOCABULARY, size), "attention_mask": np.ones(size, np.int64)}
        for size in sizes
    ]
    ragged = {"input_ids": 0, "attention_mask": 0}

    def tower(buckets: tuple[int, ...], *, full: bool) -> TowerSource:
        return TowerSource(
            engine=lambda: OnnxRuntimeEngine(path, threads=threads),
            ragged=ragged,
            length_buckets=buckets,
            pad_to_bucket=full,
        )

    sources = {
        "bucketed": tower(default_length_buckets(MAX_LENGTH), full=False),
        "longest in batch": tower((MAX_LENGTH,), full=False),
        "padded": tower((MAX_LENGTH,), full=True),
    }
    padded = [
        {name: np.stack([np.pad(s[name], (0, MAX_LENGTH - len(s[name]))) for s in part]) for name in ragged}
        for part in (samples[at : at + BATCH] for at in range(0, len(samples), BATCH))
    ]
    ratios: dict[str, list[float]] = {"padded": [], "longest in batch": [], "raw padded": []}
    with OnnxRuntimeEngine(path, threads=threads) as engine:
        async with Runner(sources, RunnerConfig()) as runner:
            rounds = Rounds(ROUNDS, SECONDS)
            async for turn in rounds:
                names = list(sources)[turn % 3 :] + list(sources)[: turn % 3]
                rates = {}
                for name in names:

                    async def ask(sample: Mapping[str, np.ndarray], tower: str = name) -> object:
                        return await runner.infer(tower, sample)

                    rates[name] = await circle_rate(ask, samples, 8 * BATCH, 0.6)
                rates["raw padded"] = raw_rate(engine, padded, len(samples), 0.6)
                for name, values in ratios.items():
                    values.append(rates["bucketed"] / rates[name])
    raw, longest = (statistics.median(ratios[name]) for name in ("raw padded", "longest in batch"))
    note = (
        f"lengths {sizes.min()} to {sizes.max()}, mean {sizes.mean():.1f}, padded to {MAX_LENGTH}; against a "
        f"bare padded session.run loop {raw:.2f}, against padding to the longest in the batch {longest:.2f}"
    )
    return [row("mixed-length text, bucketed / padded", "ratio", ratios["padded"], 1.6, 1.9, note, rounds)]
