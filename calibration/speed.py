"""How many times faster than FP32 a file is, on the CPU of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgeglm.calibration.feeds import Feeds
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.timing import compare_latency

#: Given a file, how many times faster than FP32 it is.
Speedup = Callable[[Path], float]
#: A file that is not faster than this does not pay.
MIN_GAIN = 1.0
_ROUNDS = 9


def speedup_over(source: Path, batches: Sequence[Feeds], *, threads: int, rounds: int = _ROUNDS) -> Speedup:
    """Return a function that times a file beside FP32, interleaved: the lesser of batch 1 and a whole one."""
    whole = dict(batches[0])
    feeds = [whole]
    with OnnxRuntimeEngine(source, threads=threads, spinning=False) as engine:
        if all(not isinstance(spec.shape[0], int) for spec in engine.inputs if spec.shape):
            feeds.insert(0, {name: array[:1] for name, array in whole.items()})

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
