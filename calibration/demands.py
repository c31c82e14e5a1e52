"""What quantizing a model asks of a target, of the options and of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeglm.calibration.drawing import model_inputs
from edgeglm.calibration.embeddings import tables_of
from edgeglm.calibration.feeds import Batches, Feeds
from edgeglm.calibration.outcome import Settings
from edgeglm.calibration.plan import PrecisionPlan
from edgeglm.calibration.preparation import Prepared
from edgeglm.calibration.schemes import require_scheme, scheme_named
from edgeglm.core.errors import UserError
from edgeglm.targets.legality import require_precision
from edgeglm.targets.schema import Target

MIN_SAMPLES = 2
_HELD_OUT_SHARE = 4  # one batch of this many is kept from the ranges


def require_computed(target: Target, settings: Settings, plan: PrecisionPlan | None) -> None:
    """Raise UserError unless what is asked for is something that the target's runtime computes."""
    name = settings.scheme if plan is None else plan.scheme
    methods = set(settings.methods[:1] if plan is None else plan.int8_nodes.values())
    if name == "fp8" and (others := sorted(methods - {"max"})):
        raise UserError(
            f"FP8 ranges are found by the largest value, and {others[0]!r} was asked for; take the method max"
        )
    require_precision(target, "fp8" if name == "fp8" else "int8")
    if name:
        require_scheme(scheme_named(name), target)
    if (settings if plan is None else plan).embeddings == "int4" and target.kind != "cpu":
        raise UserError(
            f"INT4 tables are an operator of ONNX Runtime, and {target.name} runs TensorRT; "
            "take --embeddings int8"
        )


def require_effect(prepared: Prepared, settings: Settings) -> None:
    """Raise UserError for an option that this model has nothing for, which its plan would yet tell of."""
    if settings.embeddings != "high" and not tables_of(prepared.model):
        raise UserError(
            f"{prepared.path.name} has no embedding table that --embeddings could make smaller (FP32, "
            "256 rows or more, looked up by rows alone); leave the option out"
        )
    names = {node for group in prepared.groups for node in group.nodes}
    if settings.smooth and not any(
        node.op_type == "MatMul" and node.name in names for node in prepared.model.graph.node
    ):
        raise UserError(
            f"{prepared.path.name} has no MatMul that becomes INT8, whose inputs alone --smooth evens out; "
            "leave the option out"
        )


def split_batches(batches: Batches, *, fixed: int = 0) -> tuple[Sequence[Feeds], Sequence[Feeds]]:
    """Return batches to find ranges on, and batches that only cosines are measured on.

    Raises UserError where there is one batch and the model takes no other size (``fixed``).
    """
    if len(batches) == 1:
        if fixed:
            raise UserError(
                f"{batches.samples} samples are one batch, and the model takes batches of {fixed} only; "
                f"give at least {2 * fixed}, for ranges and to measure"
            )
        return batches.halves()
    held = max(1, len(batches) // _HELD_OUT_SHARE)
    return batches[:-held], batches[-held:]


def fixed_batch(source: Path) -> int:
    """Return the batch size that a model is bound to, 0 for one that takes any."""
    sizes = [spec.shape[0] for spec in model_inputs(source) if spec.shape]
    return max((size for size in sizes if isinstance(size, int)), default=0)


def require_samples(batches: Batches) -> None:
    """Raise UserError for too few samples."""
    if batches.samples < MIN_SAMPLES:
        raise UserError(f"{batches.samples} calibration samples; give at least {MIN_SAMPLES}, better 64")
