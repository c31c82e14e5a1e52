"""The floor of latency: what no software on a device can beat, given its peaks.

The roofline model (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009). The floor of a whole
graph takes every fusion as done: activations never leave the chip, each weight is read once, and
reading hides behind computing. So it is a floor and not a promise; real engines take a multiple of
it, most of all small graphs, whose kernels take longer to launch than to compute. ``unfused_ms``
sums the nodes one by one as if nothing were fused; that is no bound in either direction.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeglm.targets.costs import GraphCosts, NodeCost
from edgeglm.targets.schema import Peak, Precision, Target


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The peaks of a machine.

    Attributes:
        rates: ``{precision: operations a second}`` of matrix products.
        bandwidth: Bytes a second.
        resident_bytes: What may stay in caches from one call to the next; it is not read again.
    """

    name: str
    rates: dict[Precision, float]
    bandwidth: float | None
    resident_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of one call, in milliseconds, and what binds it.

    Attributes:
        compute_ms: All matrix products at the peak rate.
        memory_ms: Weights, inputs and outputs at the full bandwidth.
        floor_ms: The larger of the two.
        binding: Which that is; "unknown" for a machine without figures.
        unfused_ms: The sum of the nodes' own floors; an indication only.
        flops: Operations of the call.
        bytes: Bytes that must be read and written.
    """

    machine: str
    batch: int
    compute_ms: float
    memory_ms: float
    floor_ms: float
    binding: str
    unfused_ms: float
    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class NodeFloor:
    """One node by itself: operations, bytes in and out, and which of the two takes longer.

    ``precision`` is that of a matrix product, empty for the rest, whose rate no profile knows.
    """

    name: str
    op: str
    precision: str
    flops: int
    bytes: int
    compute_ms: float
    memory_ms: float
    floor_ms: float
    binding: str


def machine_of(target: Target) -> Machine:
    """Return the peaks of a device's profile; none are known of the CPU or a family."""
    bandwidth = target.bandwidth_gb_s.value * 1e9 if target.bandwidth_gb_s else None
    return Machine(name=target.name, rates=_rates(target.peak), bandwidth=bandwidth)


def floor_of(costs: GraphCosts, machine: Machine, batch: int) -> Floor:
    """Return the floor of one call of ``batch`` items.

    A precision whose rate is unknown counts at a rate that is known to be no lower, else as no time:
    that keeps it a floor.
    """
    seconds = 0.0
    unfused = 0.0
    for node in costs.nodes:
        compute = _compute_seconds(node, machine, batch)
        seconds += compute
        unfused += max(compute, _moved(node, batch) / machine.bandwidth if machine.bandwidth else 0.0)
    needed = costs.weight_bytes + batch * costs.io_bytes
    read = max(0, needed - machine.resident_bytes)
    memory = read / machine.bandwidth if machine.bandwidth else 0.0
    binding = "unknown" if not (seconds or memory) else "compute" if seconds >= memory else "bandwidth"
    return Floor(
        machine=machine.name,
        batch=batch,
        compute_ms=seconds * 1e3,
        memory_ms=memory * 1e3,
        floor_ms=max(seconds, memory) * 1e3,
        binding=binding,
        unfused_ms=unfused * 1e3,
        flops=costs.flops(batch),
        bytes=needed,
    )


def node_floors(costs: GraphCosts, machine: Machine, batch: int) -> tuple[NodeFloor, ...]:
    """Return what each node would take at least if it were alone, in the order of the graph."""
    floors = []
    for node in costs.nodes:
        compute, moved = _compute_seconds(node, machine, batch), _moved(node, batch)
        memory = moved / machine.bandwidth if machine.bandwidth else 0.0
        binding = "unknown" if not (compute or memory) else "compute" if compute >= memory else "bandwidth"
        floors.append(
            NodeFloor(
                name=node.name,
                op=node.op,
                precision=node.precision if node.kind == "matrix" else "",
                flops=node.flops_fixed + batch * node.flops,
                bytes=moved,
                compute_ms=compute * 1e3,
                memory_ms=memory * 1e3,
                floor_ms=max(compute, memory) * 1e3,
                binding=binding,
            )
        )
    return tuple(floors)


def _moved(node: NodeCost, batch: int) -> int:
    return node.weight_bytes + node.bytes_fixed + batch * node.bytes


def _compute_seconds(node: NodeCost, machine: Machine, batch: int) -> float:
    if node.kind != "matrix":
        return 0.0
    rate = _rate(machine, node.precision)
    return (node.flops_fixed + batch * node.flops) / rate if rate else 0.0


def _rate(machine: Machine, precision: Precision) -> float | None:
    """Return a rate that the precision does not exceed."""
    narrower: dict[Precision, tuple[Precision, ...]] = {
        "fp32": ("fp32", "fp16", "int8"),
        "fp16": ("fp16", "int8"),
        "bf16": ("bf16", "fp16", "int8"),
        "int8": ("int8",),
        "fp8": ("fp8",),
        "fp4": ("fp4",),
    }
    return next((machine.rates[name] for name in narrower[precision] if name in machine.rates), None)


def _rates(peak: Peak) -> dict[Precision, float]:
    figures: dict[Precision, float | None] = {
        # TF32 and FP32 both pass for fp32; the FP16 rate is no lower than either, so it stays a floor.
        "fp16": peak.fp16_tflops.value if peak.fp16_tflops else None,
        "int8": peak.int8_tops.value if peak.int8_tops else None,
        "fp8": peak.fp8_tflops.value if peak.fp8_tflops else None,
    }
    return {name: value * 1e12 for name, value in figures.items() if value is not None}
