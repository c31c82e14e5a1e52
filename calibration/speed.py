"""How many times faster than what it stands beside a file is, on the machine that it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgeglm.calibration.feeds import Feeds
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.timing import compare_latency

#: Given a file, how many times faster than its reference it is: FP32 on a CPU, FP16 on a GPU.
Speedup = Callable[[Path], float]
#: Given the FP16 file and the feeds to time, what times others beside it: see ``edgeglm.compile.clock``.
Clock = Callable[[Path, Sequence[Feeds]], Speedup]
#: A file that is not faster than this does not pay on a CPU. On a GPU the FP16 file travels besides.
MIN_GAIN = 1.0
_ROUNDS = 9


def timed_feeds(source: Path, batches: Sequence[Feeds], *, threads: int = 1) -> tuple[Feeds, ...]:
    """Return what files are timed on: a whole batch, and before it one of a single sample where that goes."""
    whole = dict(batches[0])
    with OnnxRuntimeEngine(source, threads=threads, spinning=False) as engine:
        if any(isinstance(spec.shape[0], int) for spec in engine.inputs if spec.shape):
            return (whole,)
    return ({name: array[:1] for name, array in whole.items()}, whole)


def speedup_over(source: Path, batches: Sequence[Feeds], *, threads: int, rounds: int = _ROUNDS) -> Speedup:
    """Return a function that times a file beside FP32 on this CPU, interleaved; the least of its gains."""
    feeds = timed_feeds(source, batches, threads=threads)

    def measured(path: Path) -> float:
        ratios = []
        with (
            OnnxRuntimeEngine(source, threads=threads, spinning=False) as fp32,
            OnnxRuntimeEngine(path, threads=threads, spinning=False) as other,
        ):
            for batch in feeds:
                found = compare_latency({"fp32": (fp32, batch), "other": (other, batch)}, rounds=rounds)
                ratios.append(found["fp32"].median_ms / found["other"].median_ms)
        return min(ratios)

    return measured
