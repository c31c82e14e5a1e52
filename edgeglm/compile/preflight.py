"""Whether a model will build and run on a target, and how fast it can possibly be, before it is tried.

Everything is decided from recorded costs and profiles: no ``onnx``, no builder, no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from edgeglm.bundle.manifest import VariantRecord
from edgeglm.bundle.opened import Bundle
from edgeglm.compile.contract import precision_of
from edgeglm.compile.lane_record import pinned_nodes
from edgeglm.core.errors import UserError
from edgeglm.engines.plan import ShapeRange
from edgeglm.targets.build_options import BuildOptions, Range
from edgeglm.targets.costs import GraphCosts, GraphTensor, costs_from_json, costs_name
from edgeglm.targets.legality import check_lane, check_opset, check_precision, options_refusal
from edgeglm.targets.memory import MemoryAt, MemoryNeed, check_memory
from edgeglm.targets.roofline import Floor, floor_of, machine_of
from edgeglm.targets.schema import (
    Builder,
    Lane,
    Target,
    members_of,
    version_tuple,
)

BATCH: Range = BuildOptions().batch

_NEW_OPS = {"LayerNormalization": 17, "GroupNormalization": 18, "Gelu": 20}
"""Operators that TensorRT 8.5 does not know, with the opset that brought them."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One graph to judge: a tower of a variant, or a file of the user's.

    ``fp32_nodes`` are those that a builder which may choose FP16 has to keep in FP32, as lane A records.
    """

    name: str
    precision: str
    lane: Lane
    costs: GraphCosts
    file: str = ""
    fp32_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question and its answer; a refusal's last clause is the nearest legal choice."""

    what: str
    ok: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The answers for one graph on one target; its floor and memory on each member for each batch."""

    target: str
    subject: str
    checks: tuple[Check, ...]
    floors: tuple[Floor, ...]
    memory: tuple[MemoryAt, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was refused."""
        return all(check.ok for check in self.checks)

    @property
    def refusals(self) -> tuple[str, ...]:
        """The reasons of what was refused."""
        return tuple(check.reason for check in self.checks if not check.ok)


def preflight(
    subject: Subject, target: Target, *, batches: Sequence[int] = (1,), library: Builder | None = None
) -> Preflight:
    """Judge one graph for a target; for a family every member is asked and the worst decides.

    Args:
        subject: The graph.
        target: A device, a family or the CPU.
        batches: What floors and memory are told of; memory is judged at the largest batch of an engine.
        library: Who builds, if not the profile's own builder.
    """
    checks = [Check(what=what, ok=ok, reason=reason) for what, ok, reason in _asked(subject, target, library)]
    members = [(member, batch) for member in members_of(target) for batch in batches]
    return Preflight(
        target=target.name,
        subject=subject.name,
        checks=tuple(checks),
        floors=tuple(floor_of(subject.costs, machine_of(member), batch) for member, batch in members),
        memory=tuple(_memory_at(subject.costs, member, batch) for member, batch in members),
    )


def _memory_at(costs: GraphCosts, member: Target, batch: int) -> MemoryAt:
    need = MemoryNeed(weights=costs.file_bytes)
    builds = member.builder not in (None, "onnxruntime")
    return MemoryAt(batch=batch, build=need.build if builds else 0, run=need.run + costs.live(batch))


def subjects_of(bundle: Bundle) -> tuple[Subject, ...]:
    """Return the graphs of a bundle with their recorded costs.

    Raises UserError when the bundle carries no costs, or broken ones.
    """

    def costs_of(name: str) -> GraphCosts:
        if name not in bundle.manifest.files:
            raise UserError(
                f"the bundle {bundle.origin} carries no {name}; "
                "give the .onnx file itself on a host, or build the bundle again"
            )
        return costs_from_json(bundle.file(name).read_bytes(), f"{bundle.origin}: {name}")

    return tuple(
        replace(one, fp32_nodes=pins.get(one.file, ()))
        for variant in bundle.manifest.variants
        for pins in [pinned_nodes(bundle, variant)]
        for one in variant_subjects(variant, costs_of)
    )


def variant_subjects(variant: VariantRecord, costs_of: Callable[[str], GraphCosts]) -> list[Subject]:
    """Return the towers of one variant; ``costs_of`` reads the recorded costs by their file's name."""
    subjects = []
    for tower, file in sorted(variant.files.items()):
        costs, precision = costs_of(costs_name(variant.name, tower)), precision_of(variant.name)
        if precision == "int8" and not costs.quantized:
            precision = precision_of_graph(costs)  # a tower that INT8 does not pay for stays as it was
        subjects.append(
            Subject(
                name=f"{variant.name} {tower}", precision=precision, lane=variant.lane, costs=costs, file=file
            )
        )
    return subjects


def precision_of_graph(costs: GraphCosts) -> str:
    """Return the narrowest precision among a graph's matrix products."""
    found = {node.precision for node in costs.nodes if node.kind == "matrix"}
    order = ("fp4", "fp8", "int8", "fp16", "bf16", "fp32")
    return next((precision for precision in order if precision in found), "fp32")


def shapes_of(costs: GraphCosts, batch: Range = BATCH) -> dict[str, ShapeRange]:
    """Return the optimization profile of a graph: dynamic first axes are the batch, others the length.

    Raises UserError for a dynamic dimension that is neither.
    """
    profile = {}
    for tensor in costs.inputs:
        dynamic = [axis for axis, size in enumerate(tensor.shape) if not isinstance(size, int)]
        if not dynamic:
            continue
        if (complaint := _odd_dynamic(tensor, dynamic)) is not None:
            raise UserError(complaint)
        whole = []
        for end, size in enumerate(batch):
            length = (1, max(1, costs.length // 2), costs.length)[end]
            whole.append(
                tuple(
                    own if isinstance(own, int) else size if axis == 0 else length
                    for axis, own in enumerate(tensor.shape)
                )
            )
        profile[tensor.name] = ShapeRange(min=whole[0], opt=whole[1], max=whole[2])
    return profile


def _asked(subject: Subject, target: Target, library: Builder | None) -> Iterator[tuple[str, bool, str]]:
    costs = subject.costs
    legal = check_precision(target, subject.precision, library=library)
    yield "precision", legal.ok, legal.reason
    lane = check_lane(target, subject.lane)
    yield "lane", lane.ok, lane.reason
    opset = check_opset(target, costs.opset, lane=subject.lane)
    yield "opset", opset.ok, opset.reason
    natives = [m for m in members_of(target) if m.builder not in (None, "onnxruntime")]
    if natives:
        yield from _typing(subject, natives)
        yield from _operators(subject, natives)
        yield from _dynamic(costs)
        yield from _options(subject, natives, library)
    largest = max((m.engine or BuildOptions()).largest_batch for m in members_of(target))
    memory = check_memory(target, costs.file_bytes, activations=costs.live(largest))
    yield "memory", memory.ok, memory.reason


def _typing(subject: Subject, natives: Sequence[Target]) -> Iterator[tuple[str, bool, str]]:
    if subject.precision != "int8":
        return
    if subject.costs.quantized:
        yield "typing", True, "its Q/DQ nodes say what is INT8"
        return
    typed = [
        f"{runtime.library} {runtime.version}"
        for member in natives
        for runtime in member.runtimes
        if runtime.lane == "B" and (runtime.library != "tensorrt" or version_tuple(runtime.version) >= (10,))
    ]
    if typed:
        yield (
            "typing",
            False,
            f"{typed[0]} builds strongly typed and takes INT8 from Q/DQ nodes only, and the graph has none; "
            "quantize it, or build it as fp16",
        )


def _operators(subject: Subject, natives: Sequence[Target]) -> Iterator[tuple[str, bool, str]]:
    foreign = sorted(op for op in subject.costs.ops if "." in op)
    if foreign:
        yield (
            "operators",
            False,
            f"TensorRT knows no {', '.join(foreign)}, which ONNX Runtime alone has; "
            "export without ONNX Runtime's fusions",
        )
    old = [member for member in natives if member.lanes == ("A",)]
    new = sorted(op for op in subject.costs.ops if op in _NEW_OPS)
    if old and new:
        yield (
            "operators",
            False,
            f"TensorRT 8.5, the last for {old[0].name}, has no {', '.join(new)}; "
            "lower the graph to lane A (opset 16)",
        )


def _dynamic(costs: GraphCosts) -> Iterator[tuple[str, bool, str]]:
    try:
        profile = shapes_of(costs)
    except UserError as error:
        yield "shapes", False, str(error)
        return
    listed = ", ".join(f"{name} {list(r.min)} to {list(r.max)}" for name, r in profile.items())
    yield "shapes", True, listed or "all inputs are fixed"


def _options(
    subject: Subject, natives: Sequence[Target], library: Builder | None
) -> Iterator[tuple[str, bool, str]]:
    """Ask each board for what its profile wants of the builder: one release that grants it is enough."""
    for member in (found for found in natives if found.engine is not None):
        refusal = options_refusal(member, library or member.builder, (None, subject.lane))
        yield "options", refusal is None, refusal or f"{member.name} has a release that grants [engine]"


def _odd_dynamic(tensor: GraphTensor, dynamic: Sequence[int]) -> str | None:
    tokens = len(tensor.shape) == 2 and tensor.dtype in ("int64", "int32")
    odd = [axis for axis in dynamic if axis != 0 and not (tokens and axis == 1)]
    if not odd:
        return None
    return (
        f"{tensor.name} is dynamic along axis {odd[0]}, for which no range is known; "
        "export it with a fixed size there, only the batch and a text's length may vary"
    )
