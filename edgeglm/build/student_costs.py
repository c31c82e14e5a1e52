"""What an untrained student costs: its files, its operations, its floor on a target, its time here.

None of it depends on what a student has learnt, so nothing is trained to know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeglm.build.untrained import LENGTH, untrained_towers
from edgeglm.core.recipe import StudentConfig
from edgeglm.core.stage import Context
from edgeglm.targets.roofline import Machine, floor_of, machine_of
from edgeglm.targets.schema import Precision, Target, members_of

ROUNDS = 15


class Peaks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a board: operations a second by precision, and bytes a second."""

    name: str
    rates: dict[Precision, float]
    bandwidth: float | None


def peaks_of(target: Target) -> tuple[Peaks, ...]:
    """Return the peaks of all boards of a target; none where one of them has no known bandwidth or rate."""
    machines = [machine_of(member) for member in members_of(target)]
    if not all(machine.rates and machine.bandwidth for machine in machines):
        return ()
    return tuple(Peaks(name=m.name, rates=m.rates, bandwidth=m.bandwidth) for m in machines)


def judged_by(boards: Sequence[Peaks]) -> str:
    """Say what a latency budget is held against."""
    if not boards:
        return "measured on the machine that builds: FP32 in ONNX Runtime, one thread"
    names = ", ".join(board.name for board in boards)
    return f"floor: the least time that the peaks of {names} allow, which real engines take a multiple of"


class Cost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a student costs whatever it has learnt, its two towers together.

    Attributes:
        size: Its shape, named or spelled.
        resolution: Side of its images in pixels.
        parameters: All weights, the vocabulary counted.
        file_bytes: Of both FP32 files.
        flops: Operations of an image and a text of eight tokens.
        floor_ms: The least milliseconds of both on the slowest board of the target; None if unknown.
        here_ms: Median milliseconds of both here: FP32 in ONNX Runtime, one thread, timed in turn.
    """

    size: str
    resolution: int
    parameters: int
    file_bytes: int
    flops: int
    floor_ms: float | None
    here_ms: float

    @property
    def judged_ms(self) -> float:
        """Milliseconds that a budget is held against: the floor where there is one."""
        return self.here_ms if self.floor_ms is None else self.floor_ms


class CostMaker:
    """Exports untrained students into a folder and tells what they cost."""

    def __init__(
        self,
        folder: Path,
        student: StudentConfig,
        *,
        embedding_dim: int,
        opset: int,
        boards: Sequence[Peaks],
        vocabulary: int,
        context: Context,
    ) -> None:
        self._folder, self._length, self._embedding_dim = folder, student.max_length, embedding_dim
        self._opset, self._vocabulary, self._context = opset, vocabulary, context
        self._machines = [Machine(name=b.name, rates=b.rates, bandwidth=b.bandwidth) for b in boards]
        self._made: dict[tuple[str, int], tuple[dict[str, Path], Cost]] = {}

    def cost(self, size: str, resolution: int) -> Cost:
        """Export a student and count; ``here_ms`` is 0 until :meth:`timed`."""
        if (size, resolution) in self._made:
            return self._made[size, resolution][1]
        from edgeglm.export.costs import costs_from_onnx

        folder = self._folder / f"{size}-{resolution}"
        folder.mkdir()
        paths, parameters = untrained_towers(
            size,
            folder,
            resolution=resolution,
            max_length=self._length,
            vocabulary=self._vocabulary,
            embedding_dim=self._embedding_dim,
            opset=self._opset,
            threads=self._context.threads,
        )
        graphs = [costs_from_onnx(path, length=LENGTH) for path in paths.values()]
        floors = [sum(floor_of(graph, machine, 1).floor_ms for graph in graphs) for machine in self._machines]
        cost = Cost(
            size=size,
            resolution=resolution,
            parameters=parameters,
            file_bytes=sum(path.stat().st_size for path in paths.values()),
            flops=sum(graph.flops(1) for graph in graphs),
            floor_ms=max(floors) if floors else None,
            here_ms=0.0,
        )
        self._made[size, resolution] = paths, cost
        return cost

    def timed(self) -> list[Cost]:
        """Time both towers of every student made so far, in turn."""
        from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
        from edgeglm.engines.timing import compare_latency

        rng = np.random.default_rng(0)
        length = min(LENGTH, self._length)
        tokens = rng.integers(0, self._vocabulary, (1, length))
        words = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        total = dict.fromkeys(self._made, 0.0)
        for kind in ("image", "text"):
            with ExitStack() as stack:
                calls = {}
                for (size, side), (paths, _) in self._made.items():
                    engine = OnnxRuntimeEngine(paths[kind], threads=1, spinning=False)
                    pixels = {"pixels": rng.random((1, 3, side, side), dtype=np.float32)}
                    feeds: Any = pixels if kind == "image" else words
                    calls[f"{size} {side}"] = (stack.enter_context(engine), feeds)
                found = compare_latency(calls, rounds=ROUNDS)
            for size, side in total:
                total[size, side] += found[f"{size} {side}"].median_ms
        return [
            msgspec.structs.replace(cost, here_ms=round(total[key], 4))
            for key, (_, cost) in self._made.items()
        ]
