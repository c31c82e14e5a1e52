"""Which way a bundle goes on a board: for whom it was made, who builds, on which lane.

Nothing falls back in silence: a board that the target does not hold, a TensorRT that is absent or a
lane that the bundle lacks is refused, and what to ask for instead is the last clause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeglm.bundle.manifest import VariantRecord
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.receipt import Library
from edgeglm.compile.contract import precision_of, target_of
from edgeglm.core.errors import UserError
from edgeglm.engines.board import Board
from edgeglm.targets.description import dotted_sm
from edgeglm.targets.legality import check_precision
from edgeglm.targets.memory import MemoryNeed
from edgeglm.targets.schema import (
    Builder,
    Lane,
    ResolvedTarget,
    Target,
    version_tuple,
)

EngineChoice = Literal["auto", "native", "onnxruntime"]

ENOUGH = 0.8
"""The share of a profile's memory that a board must have: the system keeps some for itself."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """How a bundle is finalized here.

    Attributes:
        member: The profile that this board answers to; None for a board outside the target.
        library: What runs the towers, in ``version``.
        lane: Which portable ONNX it takes.
        variants: The candidates, those that may run this way.
        left_out: ``{variant: why it may not}``.
        notes: What a person should know of the choice.
    """

    member: Target | None
    library: Library
    version: str
    lane: Lane
    variants: tuple[VariantRecord, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...] = ()


def member_for(board: Board, resolved: ResolvedTarget) -> tuple[Target | None, str]:
    """Return the member that a board answers to, and why; None when it answers to none.

    Facts decide, not names: the compute capability must be equal, the architecture too, and the
    board must have most of the memory that the profile counts on. Of several, the largest fits. A GPU
    with memory of its own may have less, as a partition or a smaller model of its kind has: it answers
    to the smallest, and what the candidates need of it is checked before they are built.
    """
    cpus = [member for member in resolved.members if member.kind == "cpu"]
    if cpus:
        return cpus[0], "a bundle for the CPU runs anywhere"
    if board.sm is None:
        return None, "no GPU is seen here"
    same = [m for m in resolved.members if m.sm == board.sm and m.arch in (None, board.machine)]
    if not same:
        wanted = ", ".join(f"{m.name} (SM {dotted_sm(m.sm or 0)}, {m.arch})" for m in resolved.members)
        return None, f"this is {board.words}; the bundle is for {wanted}"
    room = board.memory_bytes if board.soc else board.gpu_memory_bytes
    fitting = [m for m in same if room >= ENOUGH * profile_bytes(m)]
    least = min(same, key=profile_bytes)
    if not fitting and board.soc is None:
        if not room:
            return (
                least,
                f"SM {dotted_sm(board.sm)} fits {least.name}; how much memory the GPU has is not known",
            )
        return least, (
            f"SM {dotted_sm(board.sm)} fits {least.name}, whose profile counts on "
            f"{profile_bytes(least) / 1e9:.0f} GB where this GPU has {room / 1e9:.1f} GB"
        )
    if not fitting:
        return None, (
            f"this is {board.words} with {board.memory_bytes / 1e9:.1f} GB; "
            f"{least.name} counts on {profile_bytes(least) / 1e9:.0f} GB"
        )
    best = max(fitting, key=profile_bytes)
    return best, f"SM {dotted_sm(board.sm)} and its memory fit {best.name}"


def route_for(
    bundle: Bundle, board: Board, *, engine: EngineChoice = "auto", any_board: bool = False
) -> Route:
    """Choose how a bundle is finalized on a board.

    Args:
        bundle: An opened bundle.
        board: The machine.
        engine: "auto": the target's own builder on a GPU, ONNX Runtime where there is none;
            "native" or "onnxruntime" to insist.
        any_board: Go on although the board is outside the target.

    Raises:
        UserError: the board is outside the target, the library is absent, or nothing may run.
    """
    resolved = target_of(bundle)
    member, why = member_for(board, resolved)
    name, notes = resolved.target.name, [why]
    if member is None and board.sm is not None and not any_board:
        raise UserError(
            f"this board is outside target {name}: {why}; "
            "build a bundle for it, or pass --any-board to go on at your own risk"
        )
    if member is None and board.sm is not None:
        notes.append("told to go on outside the target")
    native = None if member is None or member.builder == "onnxruntime" else member.builder
    if engine == "native" and (native is None or board.sm is None):
        raise UserError(f"no native builder serves this machine ({why}); leave --engine out")
    if engine == "onnxruntime" or native is None or board.sm is None:
        if member is None and board.sm is None:
            notes.append(f"ONNX Runtime on this CPU stands in for {name}; its times say nothing of it")
        return _by_onnxruntime(bundle, board, member, tuple(notes))
    assert member is not None
    return _by_tensorrt(bundle, board, member, native, tuple(notes))


def check_memory_here(board: Board, route: Route, bundle: Bundle) -> None:
    """Raise UserError when this board has not the free memory to build or to run the candidates.

    A GPU with memory of its own is asked for it besides: what is built and timed lies there.
    """
    sizes = {v.name: [bundle.manifest.files[f].size for f in v.files.values()] for v in route.variants}
    builds = route.library != "onnxruntime"
    largest = MemoryNeed(weights=max(size for towers in sizes.values() for size in towers))
    whole = MemoryNeed(weights=sum(size for towers in sizes.values() for size in towers))
    wanted = max(largest.build if builds else 0, whole.run)
    what = "building the largest tower" if builds and wanted == largest.build else "timing the candidates"
    if wanted > board.memory_available_bytes:
        raise UserError(
            f"{what} needs {wanted / 1e9:.2f} GB of memory and "
            f"{board.memory_available_bytes / 1e9:.2f} GB are free; "
            "end other programs or add swap, then run the same command again"
        )
    free = board.gpu_memory_bytes if board.gpu_memory_free_bytes is None else board.gpu_memory_free_bytes
    if builds and board.soc is None and free and wanted > free:
        raise UserError(
            f"{what} needs {wanted / 1e9:.2f} GB of the GPU's memory and {free / 1e9:.2f} GB are free; "
            "end other programs on the GPU, then run the same command again"
        )


def _by_onnxruntime(bundle: Bundle, board: Board, member: Target | None, notes: tuple[str, ...]) -> Route:
    version = board.libraries.get("onnxruntime")
    if version is None:
        raise UserError("ONNX Runtime is not installed here; pip install 'edgeglm[device]'")
    # The other lane holds the same weights for TensorRT 8.5: nothing is won by timing them too.
    mine = tuple(variant for variant in bundle.manifest.variants if variant.lane == "B")
    return Route(
        member=member,
        library="onnxruntime",
        version=version,
        lane="B" if mine else "A",
        variants=mine or bundle.manifest.variants,
        left_out={},
        notes=notes,
    )


def _by_tensorrt(
    bundle: Bundle, board: Board, member: Target, library: Builder, notes: tuple[str, ...]
) -> Route:
    assert library != "onnxruntime"
    version = board.libraries.get(library)
    if version is None:
        hint = (
            f"TensorRT {board.trtexec_version} is on the board but this Python does not see it: "
            "make the environment with --system-site-packages, or pass --engine trtexec"
            if board.trtexec_version and library == "tensorrt"
            else f"install {library}"
        )
        raise UserError(
            f"{library} is not to be had in this Python; {hint}, "
            "or pass --engine onnxruntime to run on the CPU"
        )
    lane: Lane = "A" if library == "tensorrt" and _older_than_10(version) else "B"
    candidates, left_out = [], {}
    for variant in bundle.manifest.variants:
        verdict = check_precision(member, precision_of(variant.name), library=library)
        if variant.lane != lane:
            left_out[variant.name] = f"it is of lane {variant.lane}, {library} {version} takes lane {lane}"
        elif not verdict.ok:
            left_out[variant.name] = verdict.reason
        else:
            candidates.append(variant)
    # The reference is FP32 and never the faster: it is built only where nothing else may be.
    passed = [variant for variant in candidates if variant.gate == "passed"]
    if passed:
        for variant in candidates:
            if variant not in passed:
                left_out[variant.name] = "it is the reference, and gated candidates are there"
    chosen = tuple(passed or candidates)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(
            f"no variant of the bundle may be built by {library} {version} here ({reasons}); "
            "build a bundle with one, or pass --engine onnxruntime"
        )
    return Route(
        member=member,
        library=library,
        version=version,
        lane=lane,
        variants=chosen,
        left_out=left_out,
        notes=notes,
    )


def _older_than_10(version: str) -> bool:
    digits = ".".join(part for part in version.split(".")[:2] if part.isdigit())
    return bool(digits) and version_tuple(digits) < (10,)


def profile_bytes(member: Target) -> float:
    """Return the memory that a profile counts on; 0 where it names none."""
    return member.memory_gb.value * 1e9 if member.memory_gb else 0.0
