"""Which named size of student meets a budget: each is exported untrained and measured on this machine.

What a student costs does not depend on what it has learnt, so nothing is trained to know it. With three named
sizes there is no space to search: all are measured. Of those that meet the budget the one with the most
parameters is taken; at equal training, mAP@10 rises with the size (docs/bench/distil.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from edgeglm.build.untrained import LENGTH, untrained_towers
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Context, Inputs, Stage

ROUNDS = 15
FILE_NAME = "sizes.json"
_UNITS = {
    "latency": {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3},
    "memory": {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
}


class SizeCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a student of one size costs, its two towers together.

    Attributes:
        size: Its name.
        image_ms: Median milliseconds of one image, FP32 in ONNX Runtime on this machine, one thread.
        text_ms: The same of one text of eight tokens.
        parameters: All weights, the vocabulary counted.
        file_bytes: Of both FP32 files, which is what their weights take in memory.
    """

    size: str
    image_ms: float
    text_ms: float
    parameters: int
    file_bytes: int

    @property
    def latency_ms(self) -> float:
        """Milliseconds of an image and a text."""
        return self.image_ms + self.text_ms


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a student may take at most; None sets no bound. ``latency_ms`` is of an image and a text."""

    latency_ms: float | None = None
    memory_bytes: float | None = None

    def excess(self, cost: SizeCost) -> float:
        """Return the largest ratio of cost to budget; at most 1 meets it."""
        latency = cost.latency_ms / self.latency_ms if self.latency_ms else 0.0
        return max(latency, cost.file_bytes / self.memory_bytes if self.memory_bytes else 0.0)


def budget_of(latency: str | None, memory: str | None) -> Budget | None:
    """Read budgets such as ``10ms`` and ``20MB``; None for neither. Raises UserError."""
    if latency is None and memory is None:
        return None
    return Budget(
        latency_ms=None if latency is None else _amount(latency, "latency", "10ms"),
        memory_bytes=None if memory is None else _amount(memory, "memory", "20MB"),
    )


def _amount(text: str, kind: str, example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS[kind].get(found[2].lower()) if found else None
    if found is None or factor is None or float(found[1]) <= 0:
        units = ", ".join(unit for unit in _UNITS[kind] if unit)
        raise UserError(
            f"cannot read the {kind} budget {text!r}; "
            f"write it as {example} (a positive number and one of {units})"
        )
    return float(found[1]) * factor


class SizesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the cost of a size besides its shape."""

    sizes: tuple[str, ...]
    resolution: int
    max_length: int
    vocabulary: int
    embedding_dim: int
    opset: int


class StudentSizesStage(Stage[SizesConfig]):
    """``sizes.json``: the :class:`SizeCost` of each size, measured interleaved. The store keeps it."""

    name = "student-sizes"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build.student_sizes",
        "edgeglm.build.untrained",
        "edgeglm.export",
        "edgeglm.models.students",
        "edgeglm.models.student_shapes",
        "edgeglm.models.efficientnet_lite",
        "edgeglm.engines.timing",
        "edgeglm.engines.onnxruntime_engine",
    )
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime-gpu")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Export every size with random weights, then call each in turn."""
        with context.store.scratch() as folder:
            costs = measured_sizes(self.config, folder, context)
        (out / FILE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=1))
        return {"sizes": msgspec.to_builtins(costs)}


def read_sizes(artifact: Artifact) -> tuple[SizeCost, ...]:
    """Read what the stage wrote."""
    return msgspec.json.decode((artifact.path / FILE_NAME).read_bytes(), type=tuple[SizeCost, ...])


def measured_sizes(config: SizesConfig, folder: Path, context: Context) -> tuple[SizeCost, ...]:
    """Export the sizes into ``folder`` and time both towers of each, interleaved."""
    from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
    from edgeglm.engines.timing import compare_latency

    side, length = config.resolution, min(LENGTH, config.max_length)
    parameters: dict[str, int] = {}
    paths: dict[tuple[str, str], Path] = {}
    with context.progress.task("Student sizes", total=len(config.sizes)) as task:
        for size in config.sizes:
            made, parameters[size] = untrained_towers(
                size,
                folder,
                resolution=side,
                max_length=config.max_length,
                vocabulary=config.vocabulary,
                embedding_dim=config.embedding_dim,
                opset=config.opset,
                threads=context.threads,
            )
            paths.update({(size, kind): path for kind, path in made.items()})
            task.advance()
    latency: dict[str, dict[str, float]] = {}
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocabulary, (1, length))
    one: dict[str, dict[str, Any]] = {
        "image": {"pixels": rng.random((1, 3, side, side), dtype=np.float32)},
        "text": {"input_ids": tokens, "attention_mask": np.ones_like(tokens)},
    }
    for kind, feed in one.items():
        with ExitStack() as stack:
            calls = {
                size: (
                    stack.enter_context(OnnxRuntimeEngine(paths[size, kind], threads=1, spinning=False)),
                    feed,
                )
                for size in config.sizes
            }
            timed = compare_latency(calls, rounds=ROUNDS)
        latency[kind] = {size: found.median_ms for size, found in timed.items()}
    return tuple(
        SizeCost(
            size=size,
            image_ms=round(latency["image"][size], 4),
            text_ms=round(latency["text"][size], 4),
            parameters=parameters[size],
            file_bytes=sum(paths[size, kind].stat().st_size for kind in one),
        )
        for size in config.sizes
    )


def chosen_size(costs: Sequence[SizeCost], budget: Budget) -> SizeCost:
    """Return the largest student within the budget. Raises UserError that names the nearest."""
    within = [cost for cost in costs if budget.excess(cost) <= 1]
    if within:
        return max(within, key=lambda cost: cost.parameters)
    nearest = min(costs, key=budget.excess)
    asked = [
        f"{name} {value}"
        for name, value in (
            ("latency", f"{budget.latency_ms:g} ms" if budget.latency_ms else ""),
            ("memory", f"{budget.memory_bytes / 1e6:g} MB" if budget.memory_bytes else ""),
        )
        if value
    ]
    raise UserError(
        f"no student meets the budget ({', '.join(asked)}): the nearest is {nearest.size} with "
        f"{nearest.latency_ms:.2f} ms for an image and a text here and {nearest.file_bytes / 1e6:.1f} MB;"
        " raise the budget to that, or lower student.resolution"
    )


def on_front(costs: Sequence[SizeCost]) -> tuple[SizeCost, ...]:
    """Return the sizes that no other one beats: none is larger and as fast, ascending in latency."""
    kept = [
        cost
        for cost in costs
        if not any(
            other.parameters > cost.parameters and other.latency_ms <= cost.latency_ms for other in costs
        )
    ]
    return tuple(sorted(kept, key=lambda cost: cost.latency_ms))


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A recipe with the size that a budget chose, what all sizes cost, and where that is kept."""

    recipe: Recipe
    chosen: SizeCost
    costs: tuple[SizeCost, ...]
    artifact: Artifact


def sized_recipe(recipe: Recipe, budget: Budget, context: Context) -> Sized:
    """Measure the named sizes (or take what the store has) and set ``student.size`` to the chosen one.

    Raises:
        UserError: No size meets the budget; it names the nearest.
    """
    from edgeglm.models.student_shapes import FAMILY

    student = recipe.student
    config = SizesConfig(
        sizes=FAMILY,
        resolution=student.resolution,
        max_length=student.max_length,
        vocabulary=_vocabulary_of(recipe, context),
        embedding_dim=recipe.teacher.embedding_dim,
        opset=recipe.export.opset,
    )
    artifact = StudentSizesStage(config)({}, context).artifact
    costs = read_sizes(artifact)
    chosen = chosen_size(costs, budget)
    sized = msgspec.structs.replace(recipe, student=msgspec.structs.replace(student, size=chosen.size))
    return Sized(recipe=sized, chosen=chosen, costs=costs, artifact=artifact)


def _vocabulary_of(recipe: Recipe, context: Context) -> int:
    """Return the entries of the teacher's vocabulary, which the student takes over."""
    from edgeglm.adapt.stages import source_spec
    from edgeglm.adapt.text_teacher import load_text_teacher
    from edgeglm.assets import fetch_asset

    name = recipe.teacher.text
    source = fetch_asset(source_spec(name), context.store, context.progress)
    with context.store.scratch() as folder:
        text = load_text_teacher(name, source, folder / "text", max_length=recipe.student.max_length)
        return text.tokenizer.vocabulary_size
