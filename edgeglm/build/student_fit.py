"""Whether every board of a target will take the student, asked before anything is trained.

What a board refuses (a precision, an opset, more memory than it has) does not depend on what the student
has learnt. So an untrained one is exported once, its costs are recorded, and each variant that the recipe
asks for is judged as ``edgeglm plan`` would judge it. The packed files are judged again: quantization may
leave a variant out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from edgeglm.build.untrained import fewer_entries, untrained_towers
from edgeglm.compile.fit import VariantFit, fits_of, require_fit
from edgeglm.compile.preflight import Subject
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.targets.costs import GraphCosts, costs_from_json, json_from_costs
from edgeglm.targets.schema import Lane, Precision, ResolvedTarget

TOWERS = ("image", "text")
_LANE_A_OPSET = 16
_LOWERED = ("LayerNormalization", "GroupNormalization", "Gelu")
"""Operators that lane A is written without."""


class StudentFitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the graphs of a student besides the text teacher's own vocabulary.

    ``entries`` are what the recipe's teacher and student keep of it; 0 is all.
    """

    size: str
    resolution: int
    max_length: int
    embedding_dim: int
    opset: int
    text_teacher: str
    entries: tuple[int, ...] = ()


class StudentFitStage(Stage[StudentFitConfig]):
    """``image.json`` and ``text.json``: the recorded costs of the untrained towers in FP32."""

    name = "student-fit"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build.student_fit",
        "edgeglm.build.untrained",
        "edgeglm.export",
        "edgeglm.models.students",
        "edgeglm.models.student_shapes",
        "edgeglm.models.efficientnet_lite",
    )
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Export both towers and record what they ask of a machine."""
        from edgeglm.adapt.text_teacher import load_text_teacher
        from edgeglm.export.costs import costs_from_onnx

        config = self.config
        with context.store.scratch() as folder:
            text = load_text_teacher(
                config.text_teacher, inputs["text"], folder / "teacher", max_length=config.max_length
            )
            paths, parameters = untrained_towers(
                config.size,
                folder,
                resolution=config.resolution,
                max_length=config.max_length,
                vocabulary=fewer_entries(text.tokenizer.vocabulary_size, *config.entries),
                embedding_dim=config.embedding_dim,
                opset=config.opset,
                threads=context.threads,
            )
            for tower, path in paths.items():
                (out / f"{tower}.json").write_bytes(json_from_costs(costs_from_onnx(path)))
        return {"parameters": parameters}


def untrained_fits(
    artifact: Artifact, candidates: Sequence[str], target: ResolvedTarget
) -> tuple[VariantFit, ...]:
    """Ask every board about every variant that the recipe would make of the student.

    Args:
        artifact: Of :class:`StudentFitStage`.
        candidates: The precisions to be tried.
        target: The boards, with what the recipe asks of their builders.
    """
    costs = {
        tower: costs_from_json((artifact.path / f"{tower}.json").read_bytes(), tower) for tower in TOWERS
    }
    variants: dict[str, list[Subject]] = {
        "fp32": [_subject("fp32", tower, "fp32", "B", costs[tower]) for tower in TOWERS]
    }
    old = any(member.lanes == ("A",) for member in target.members)
    for name in candidates:
        variants[name] = [_subject(name, tower, name, "B", costs[tower]) for tower in TOWERS]
        if old:
            lowered = f"{name}-lane-a"
            variants[lowered] = [_subject(lowered, tower, name, "A", costs[tower]) for tower in TOWERS]
    return fits_of(variants, target.members)


def require_untrained_fit(fits: Sequence[VariantFit]) -> None:
    """Raise UserError for a board that will take no variant; nothing was trained yet."""
    try:
        require_fit(fits)
    except UserError as error:
        raise UserError(f"before anything is trained: {error}") from error


def _subject(variant: str, tower: str, precision: str, lane: Lane, costs: GraphCosts) -> Subject:
    """Return a tower as a candidate would be: its products in that precision, for lane A lowered."""
    narrow: Precision = "int8" if precision == "int8" else "fp16" if precision == "fp16" else "fp32"
    nodes = tuple(
        msgspec.structs.replace(node, precision=narrow) if node.kind == "matrix" else node
        for node in costs.nodes
    )
    ops = {op: count for op, count in costs.ops.items() if lane == "B" or op not in _LOWERED}
    changed = msgspec.structs.replace(
        costs,
        nodes=nodes,
        ops=ops,
        quantized=precision == "int8",
        opset=min(costs.opset, _LANE_A_OPSET) if lane == "A" else costs.opset,
    )
    file = f"models/{variant}/{tower}.onnx"
    return Subject(name=f"{variant} {tower}", precision=precision, lane=lane, costs=changed, file=file)
