"""Who builds a target's engines: this machine now, the device later, or nobody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgeglm.core.errors import UserError
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.libraries import Library, installed_version
from edgeglm.targets.build_options import BuildOptions
from edgeglm.targets.description import dotted_sm
from edgeglm.targets.legality import check_lane, options_refusal
from edgeglm.targets.schema import TENSORRT_RTX_SMS, Lane, ResolvedTarget, Target, members_of

Status = Literal["build", "deferred", "onnxruntime"]


@dataclass(frozen=True, kw_only=True)
class Host:
    """What this machine can build with: library versions (None: absent) and the SMs of its GPUs."""

    tensorrt: str | None
    tensorrt_rtx: str | None
    sms: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MemberPlan:
    """The decision for one device.

    Attributes:
        status: "build": here and now by ``library``; "deferred": the bundle carries the ONNX and
            the device builds; "onnxruntime": the ONNX is what runs.
        reason: Why, in one sentence.
        library: Who builds, now or on the device; None for ONNX Runtime.
        version: The version that builds now; None unless ``status`` is "build".
    """

    member: Target
    status: Status
    reason: str
    library: Library | None = None
    version: str | None = None


def this_host() -> Host:
    """Look at this machine, importing no TensorRT."""
    return Host(
        tensorrt=installed_version("tensorrt"),
        tensorrt_rtx=installed_version("tensorrt-rtx"),
        sms=tuple(sorted({device.sm for device in cuda_devices()})),
    )


def plan_compile(
    target: Target | ResolvedTarget, *, lane: Lane = "B", host: Host | None = None
) -> tuple[MemberPlan, ...]:
    """Decide for every member of a target.

    Args:
        target: A device, a family, the CPU, or one of these resolved.
        lane: The portable ONNX that the bundle carries.
        host: What can build; this machine if None.
    """
    members = target.members if isinstance(target, ResolvedTarget) else members_of(target)
    return tuple(_decided(member, lane, host or this_host()) for member in members)


def require_options(target: ResolvedTarget) -> None:
    """Ask every board for what its builder is to do besides, before anything is made.

    Raises UserError for the first of which no release grants it, or that is built for here where this
    machine cannot do it.
    """
    for plan in plan_compile(target):
        member = plan.member
        if refusal := options_refusal(member, member.builder, (None, "A", "B")):
            raise UserError(refusal)
        if plan.status == "build" and plan.library is not None and member.engine is not None:
            for refusal in refused_here(member.engine, plan.library):
                raise UserError(f"{member.name}: {refusal}")


def refused_here(options: BuildOptions, library: Library) -> Iterator[str]:
    """Yield what this very machine cannot do of what a release grants."""
    if library == "tensorrt-rtx" and options.refit and not cuda_devices():
        yield "TensorRT-RTX builds refittable plans on a GPU only, and there is none; leave refit out"


def _decided(member: Target, lane: Lane, host: Host) -> MemberPlan:
    if member.builder == "onnxruntime" or member.builder is None or member.sm is None:
        return MemberPlan(
            member=member, status="onnxruntime", reason="ONNX Runtime executes the ONNX file itself"
        )
    library: Library = member.builder
    fitting = check_lane(member, lane)
    if not fitting.ok:
        reason = (
            f"{fitting.reason}; run 'sh finalize.sh' on the device"
            if member.lanes == ("A",)
            else f"no engine of lane {lane} is built for it: {fitting.reason}"
        )
        return MemberPlan(member=member, status="deferred", reason=reason, library=library)
    if library == "tensorrt-rtx":
        return _by_rtx(member, host)
    return _by_tensorrt(member, member.sm, host)


def _by_rtx(member: Target, host: Host) -> MemberPlan:
    if host.tensorrt_rtx is None:
        reason = "TensorRT-RTX is not installed here; pip install 'edgeglm[build]' on an x86-64 host"
        return MemberPlan(member=member, status="deferred", reason=reason, library="tensorrt-rtx")
    assert member.sm in TENSORRT_RTX_SMS, "the schema refuses others"
    reason = f"TensorRT-RTX {host.tensorrt_rtx} builds for SM {dotted_sm(member.sm)} without a GPU"
    return MemberPlan(
        member=member, status="build", reason=reason, library="tensorrt-rtx", version=host.tensorrt_rtx
    )


def _by_tensorrt(member: Target, sm: int, host: Host) -> MemberPlan:
    if host.tensorrt is not None and sm in host.sms:
        reason = f"TensorRT {host.tensorrt} builds for the GPU of this machine, SM {dotted_sm(sm)}"
        return MemberPlan(
            member=member, status="build", reason=reason, library="tensorrt", version=host.tensorrt
        )
    here = ", ".join(map(dotted_sm, host.sms))
    lacks = (
        "TensorRT is not installed here" if host.tensorrt is None else f"the GPU here is SM {here or 'none'}"
    )
    reason = (
        f"TensorRT builds for SM {dotted_sm(sm)} on such a GPU only, and {lacks}; "
        "run 'edgeglm finalize' on the device"
    )
    return MemberPlan(member=member, status="deferred", reason=reason, library="tensorrt")
