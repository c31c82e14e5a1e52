"""What a target may run, and why not: precision, lane, opset, options of the builder.

Every refusal names the fact it rests on and the nearest legal choice. For a family each member is
asked and the worst answer decides. Hardware facts are rules over ``sm`` here, so that they hold for
a user's own profile too; a profile can only narrow them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.targets.build_options import option_refusals
from edgeglm.targets.schema import (
    Builder,
    Lane,
    Precision,
    RuntimeVersion,
    Target,
    members_of,
    version_tuple,
)

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# Nearest first: the width that the refused choice was after, then the safer ones.
_NEAREST: dict[Precision, tuple[Precision, ...]] = {
    "fp4": ("fp8", "int8", "fp16", "fp32"),
    "fp8": ("int8", "fp16", "fp32"),
    "int8": ("fp8", "fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32", "int8"),
    "fp32": ("fp16", "bf16", "int8"),
}

# The newest opset that a TensorRT release parses, by its first release (NVIDIA TensorRT release notes).
_TENSORRT_OPSETS = (((8, 5), 17), ((10, 3), 20), ((10, 13), 24), ((11, 0), 24))
_LANE_A_OPSET = 16


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer for a target; for a family, that of the member that decides.

    Attributes:
        ok: Whether the choice is legal on every member.
        target: The device that decided.
        reason: The fact, and for a refusal the nearest legal choice in its last clause.
        nearest: A legal choice to take instead, or None when there is none or none is needed.
        members: The verdict of each member of a family; empty for a device.
    """

    ok: bool
    target: str
    reason: str
    nearest: str | None = None
    members: tuple[Verdict, ...] = ()


def check_precision(target: Target, precision: str, *, library: Builder | None = None) -> Verdict:
    """Say whether matrix products of ``precision`` are legal on a target.

    Args:
        target: A device, a family (every member is asked) or the CPU.
        precision: One of ``PRECISIONS``. Raises UserError for another.
        library: The library that builds the engine, if it is not the profile's own builder.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    members = members_of(target)
    verdicts = [_device_precision(member, precision, library) for member in members]
    if target.kind != "family":
        return verdicts[0]
    common = [
        other
        for other in _NEAREST[precision]
        if all(_precision_refusal(member, other, library) is None for member in members)
    ]
    return _worst(target, verdicts, common[0] if common else None)


def require_precision(target: Target, precision: str, *, library: Builder | None = None) -> None:
    """Raise UserError with the verdict's reason unless the precision is legal."""
    verdict = check_precision(target, precision, library=library)
    if not verdict.ok:
        raise UserError(verdict.reason)


def legal_precisions(target: Target) -> tuple[Precision, ...]:
    """Return the precisions that are legal on every member, in the first member's order."""
    members = members_of(target)
    return tuple(
        precision
        for precision in members[0].precisions
        if all(_precision_refusal(member, precision, None) is None for member in members)
    )


def check_lane(target: Target, lane: Lane) -> Verdict:
    """Say whether some TensorRT release of the target takes the portable ONNX of ``lane``."""
    verdicts = []
    for member in members_of(target):
        if not member.lanes:
            reason = f"{member.name} runs ONNX Runtime, which takes any lane"
            verdicts.append(Verdict(ok=True, target=member.name, reason=reason))
        elif lane in member.lanes:
            reason = f"{member.name} takes lane {lane}"
            verdicts.append(Verdict(ok=True, target=member.name, reason=reason))
        else:
            versions = ", ".join(f"{r.library} {r.version}" for r in member.runtimes) or "its library"
            reason = (
                f"{member.name} has {versions}, which does not take lane {lane}; use lane {member.lanes[0]}"
            )
            verdicts.append(Verdict(ok=False, target=member.name, reason=reason, nearest=member.lanes[0]))
    return verdicts[0] if target.kind != "family" else _worst(target, verdicts, None)


def check_opset(target: Target, opset: int, *, lane: Lane = "B") -> Verdict:
    """Say whether the oldest release of ``lane`` on every member parses this ONNX opset."""
    verdicts = []
    for member in members_of(target):
        limits = [
            (limit, runtime)
            for runtime in member.runtimes
            if runtime.lane == lane and (limit := max_opset(runtime)) is not None
        ]
        limit, runtime = min(limits, key=lambda pair: pair[0]) if limits else (opset, None)
        if opset <= limit or runtime is None:
            reason = f"{member.name} parses opset {opset} on lane {lane}"
            verdicts.append(Verdict(ok=True, target=member.name, reason=reason))
            continue
        reason = (
            f"{runtime.library} {runtime.version} on {member.name} parses opsets up to {limit}, "
            f"not {opset}; export with opset {limit}"
        )
        verdicts.append(Verdict(ok=False, target=member.name, reason=reason, nearest=f"opset {limit}"))
    if target.kind != "family":
        return verdicts[0]
    refused = [int(verdict.nearest.split()[1]) for verdict in verdicts if verdict.nearest]
    return _worst(target, verdicts, f"opset {min(refused)}" if refused else None)


def max_opset(runtime: RuntimeVersion) -> int | None:
    """Return the newest opset that a TensorRT release parses; None where no limit is known."""
    if runtime.library != "tensorrt":
        return None
    if runtime.lane == "A":
        return _LANE_A_OPSET
    known = [opset for first, opset in _TENSORRT_OPSETS if version_tuple(runtime.version)[:2] >= first]
    return known[-1] if known else None


def options_refusal(member: Target, library: Builder | None, lanes: tuple[Lane | None, ...]) -> str | None:
    """Return why no release of a library on these lanes grants a board's options; None if one does."""
    releases = [r for r in member.runtimes if r.library == library and r.lane in lanes]
    refusals = [next(refused_by(member, runtime), None) for runtime in releases]
    return f"{member.name}: {refusals[-1]}" if refusals and all(refusals) else None


def refused_by(member: Target, runtime: RuntimeVersion) -> Iterator[str]:
    """Yield what a release refuses of the options in a device's profile."""
    if member.engine is not None:
        yield from option_refusals(
            member.engine, library=runtime.library, version=runtime.version, sm=member.sm
        )


def _device_precision(target: Target, precision: Precision, library: Builder | None) -> Verdict:
    fact = _precision_refusal(target, precision, library)
    if fact is None:
        reason = f"{target.name} runs {precision}"
        return Verdict(ok=True, target=target.name, reason=reason)
    nearest = next((p for p in _NEAREST[precision] if _precision_refusal(target, p, library) is None), None)
    remedy = f"use {nearest}" if nearest else "choose another target"
    return Verdict(ok=False, target=target.name, reason=f"{target.name}: {fact}; {remedy}", nearest=nearest)


def _precision_refusal(target: Target, precision: Precision, library: Builder | None) -> str | None:
    """Return the fact that forbids ``precision`` on one device, or None."""
    library = library or target.builder
    if fact := _hardware_refusal(target.sm, precision):
        return fact
    if library == "tensorrt-rtx" and target.sm == 75 and precision == "fp32":
        return "TensorRT-RTX does not support FP32 GEMM on SM 7.5 (Turing)"
    if precision == "fp8" and target.lanes == ("A",):
        return "TensorRT 8.5, the last for this board, has no FP8"
    if precision not in target.precisions and library == target.builder:
        return f"its profile does not list {precision} among {', '.join(target.precisions)}"
    return None


def _hardware_refusal(sm: int | None, precision: Precision) -> str | None:
    """Tensor-core generations by compute capability, as in NVIDIA Model Optimizer's support matrix."""
    if sm is None:
        return None
    dotted = f"SM {sm // 10}.{sm % 10}"
    if precision == "fp4" and sm < 100:
        return f"{dotted} has no FP4 tensor cores, which begin with Blackwell (SM 10.0)"
    if precision == "fp8" and sm < 89:
        return f"{dotted} has no FP8 tensor cores, which begin with Ada (SM 8.9)"
    if precision == "bf16" and sm < 80:
        return f"{dotted} has no BF16 tensor cores, which begin with Ampere (SM 8.0)"
    if precision == "int8" and sm < 61:
        return f"{dotted} has no INT8 dot product, which begins with Pascal (SM 6.1)"
    return None


def _worst(family: Target, verdicts: list[Verdict], nearest: str | None) -> Verdict:
    refused = [verdict for verdict in verdicts if not verdict.ok]
    if not refused:
        reason = f"every member of {family.name} agrees: {verdicts[0].reason}"
        return Verdict(ok=True, target=verdicts[0].target, reason=reason, members=tuple(verdicts))
    facts = "; ".join(verdict.reason.rpartition("; ")[0] for verdict in refused)
    remedy = f"use {nearest} for the family" if nearest else "build for the other members on their own"
    return Verdict(
        ok=False,
        target=refused[0].target,
        reason=f"{family.name}: {facts}; {remedy}",
        nearest=nearest,
        members=tuple(verdicts),
    )
