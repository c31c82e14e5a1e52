"""Whether a target's deep-learning accelerator can be used at all, and whether a graph may run on it.

Source: NVIDIA TensorRT documentation, "Working with DLA" and "DLA Supported Layers and Restrictions".
A layer that the DLA lacks runs on the GPU where the builder is allowed to fall back, else fails the build.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeglm.targets.costs import GraphCosts
from edgeglm.targets.legality import Verdict
from edgeglm.targets.schema import Lane, Target, members_of

PRECISIONS = ("fp16", "int8")

_FOREIGN = frozenset(
    [
        "Attention", "Einsum", "Erf", "Gather", "GatherElements", "GatherND", "Gelu",
        "GroupNormalization", "GRU", "InstanceNormalization", "LayerNormalization", "LSTM",
        "MatMul", "NonZero", "OneHot", "Range", "ReduceL2", "ReduceMean", "ReduceSum", "RNN",
        "TopK", "Trilu", "Where",
    ]
)  # fmt: skip
"""Operators that become layers which the table of layers for Jetson does not list."""


def check_dla(
    target: Target, *, precision: str | None = None, costs: GraphCosts | None = None, lane: Lane = "B"
) -> Verdict:
    """Say whether every member has a DLA and a TensorRT release with its compiler, and takes a graph there.

    Args:
        target: A device or a family; the worst member decides.
        precision: Of a graph's matrix products, if it is about a graph.
        costs: The recorded facts of that graph.
        lane: The portable ONNX that it is.
    """
    verdicts = []
    for member in members_of(target):
        refusal = _board_refusal(member) or next(_graph_refusals(precision, costs, lane), None)
        if refusal is None:
            verdicts.append(Verdict(ok=True, target=member.name, reason=_offer(member, costs)))
        else:
            reason = f"{member.name}: {refusal}" if member.dla and costs else refusal
            verdicts.append(Verdict(ok=False, target=member.name, reason=reason, nearest="gpu"))
    worst = next((verdict for verdict in verdicts if not verdict.ok), verdicts[0])
    if target.kind != "family":
        return worst
    return Verdict(
        ok=worst.ok,
        target=worst.target,
        reason=f"{target.name}: {worst.reason}",
        nearest=worst.nearest,
        members=tuple(verdicts),
    )


def _board_refusal(member: Target) -> str | None:
    if member.dla is None:
        return f"{member.name} has no DLA; use its GPU"
    if not any(runtime.dla for runtime in member.runtimes):
        listed = ", ".join(f"{runtime.library} {runtime.version}" for runtime in member.runtimes)
        return f"{member.name} has a DLA, but none of {listed} brings its compiler; use its GPU"
    return None


def _graph_refusals(precision: str | None, costs: GraphCosts | None, lane: Lane) -> Iterator[str]:
    chosen_by_flag = lane == "A" and precision == "fp32"  # its builder computes in FP16 all the same
    if precision is not None and precision not in PRECISIONS and not chosen_by_flag:
        yield f"a DLA computes in {' and '.join(PRECISIONS)}, not in {precision}; use fp16"
    if costs is None:
        return
    if lane == "A" and costs.quantized:
        yield (
            "the DLA of TensorRT 8.5 takes no Q/DQ nodes; give trtexec the FP16 graph with --int8 and the "
            "--calib file that 'edgeglm lower --calibration-cache' writes, or use the GPU"
        )
    if foreign := sorted(_FOREIGN.intersection(costs.ops)):
        yield (
            f"a DLA has no {', '.join(foreign)}; use the GPU, or add --useDLACore=0 --allowGPUFallback to "
            "trtexec, which leaves the rest to the DLA"
        )


def _offer(member: Target, costs: GraphCosts | None) -> str:
    """Name each release with the DLA's compiler, and each without: JetPack decides, not the board."""
    assert member.dla is not None
    with_it = [runtime for runtime in member.runtimes if runtime.dla]
    without = [runtime.version for runtime in member.runtimes if not runtime.dla]
    named = ", ".join(
        f"{runtime.version}{f' of JetPack {runtime.jetpack}' if runtime.jetpack else ''}"
        for runtime in with_it
    )
    reason = f"{member.name} has {member.dla.cores} DLA cores, with TensorRT {named}"
    if without:
        reason += f"; {', '.join(without)} brings no compiler for them"
    dynamic = costs is not None and any(
        not isinstance(size, int) for tensor in costs.inputs for size in tensor.shape
    )
    return reason + ("; build one engine for each shape, with min = opt = max" if dynamic else "")
