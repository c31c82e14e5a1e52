"""What a search measured, as ``report.json`` holds it, and what follows from that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from edgeglm.calibration.plan import PlanGroup, PrecisionPlan
from edgeglm.calibration.schemes import Method

Beside = Literal["fp32", "fp16"]
Step = Literal["scheme", "alone", "greedy", "pareto"]
_CLEARLY = 1.1  # of two speeds: two timings of one file differ by several percent


class Evaluated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file that was made and measured.

    Attributes:
        step: What it was made for.
        scheme, methods: How.
        high: Groups in high precision.
        int8_share: Share of the weights that are INT8.
        saved: Share of what INT8 could save of the roofline's time; it orders what is not timed.
        score: The metric's value; cosine without a metric.
        kept: Score over FP32's.
        cosine: Mean cosine to FP32 on samples that no range was found on.
        speedup: Over what the report stands ``beside`` on this machine; None where it was not measured.
        passed: Whether it is above the gate.
    """

    step: Step
    scheme: str
    method: Method
    high: tuple[str, ...]
    int8_share: float
    saved: float
    score: float
    kept: float
    cosine: float
    speedup: float | None
    passed: bool


class Ranked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one group costs when it alone is INT8: metric lost (of FP32's) and cosine.

    Where the evaluations do not suffice for each group, neighbours are measured ``together``, and the
    numbers are those of all of them.
    """

    group: str
    nodes: tuple[str, ...]
    lost: float
    cosine: float
    together: tuple[str, ...] = ()


class SchemeTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many times faster than what it stands beside the whole model is by a scheme, on this machine."""

    scheme: str
    speedup: float


class SearchReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of a search.

    Attributes:
        gate: The least share of FP32's score that passes.
        baseline: FP32's score.
        evaluations: In the order in which they were made; the same every time but for ``speedup``.
        ranking: The most harmful group first; empty if no ranking was needed or asked for.
        frontier: Places in ``evaluations`` of those that no other beats in both speed and score.
        chosen: The plan, or None when nothing passes the gate.
        others: The next best that pass, for the case that the chosen one's final file does not: on a
            TensorRT target that one computes in FP16 besides, and what was measured in FP32.
        reason: Why that, or why nothing.
        timings: Of the schemes, where this machine is the target.
        unmade: Scheme -> why its quantizer failed on this model; the others were searched.
        order: What said which of two plans is faster: files timed here, or the target's roofline. It picks
            the INT8 plan that travels; a device times that plan's file beside FP16.
        beside: What speeds are relative to: FP32 on a CPU, FP16 on a GPU.
    """

    gate: float
    baseline: float
    evaluations: tuple[Evaluated, ...]
    ranking: tuple[Ranked, ...]
    frontier: tuple[int, ...]
    chosen: PrecisionPlan | None
    reason: str
    others: tuple[PrecisionPlan, ...] = ()
    timings: tuple[SchemeTime, ...] = ()
    unmade: dict[str, str] = {}
    order: Literal["timed", "roofline"] = "timed"
    beside: Beside = "fp32"


def reached_words(scheme: str, kept: float, cosine: float, speedup: float | None, beside: Beside) -> str:
    """Return in one line what a file reaches: the summary of its plan."""
    speed = "" if speedup is None else f", {speedup:.2f} x {beside.upper()}'s speed"
    return f"{scheme}: keeps {kept:.4f} of FP32, cosine {cosine:.4f}{speed}"


def pace(found: Evaluated) -> float:
    """Order by measured speed, else by the roofline."""
    return found.speedup if found.speedup is not None else found.saved


def clearly_slower(speed: float, speeds: Iterable[float]) -> bool:
    """Whether one of ``speeds`` is faster by more than timings of one file differ."""
    return speed * _CLEARLY < max(speeds)


def swiftest_first(found: Sequence[Evaluated], *, by_score: bool = False) -> list[Evaluated]:
    """Return those that none is clearly faster than, then the others, the faster first.

    The former count as equally fast, for a timing is off by several percent and a choice should not depend
    on that: they keep their order, or the one that keeps most of the score is first.
    """
    if not found:
        return []
    timed = any(e.speedup is not None for e in found)
    least = max(map(pace, found)) / (_CLEARLY if timed else 1.0)

    def place(one: Evaluated) -> tuple[float, float]:
        return (-least if pace(one) >= least else -pace(one)), (-one.kept if by_score else 0.0)

    return sorted(found, key=place)


def worth_mending(found: Evaluated, starts: Sequence[Evaluated]) -> bool:
    """Whether a failing start may still beat the fastest that passes: only then is it mended."""
    passing = [pace(e) for e in starts if e.passed]
    return not passing or pace(found) > _CLEARLY * max(passing)


def explained(plan: PrecisionPlan, best: Evaluated, ranking: Sequence[Ranked], summary: str) -> PrecisionPlan:
    """Write into each group what was measured of it."""
    alone: Mapping[str, Ranked] = {ranked.group: ranked for ranked in ranking}

    def reason(group: PlanGroup) -> str:
        if group.name not in alone:
            return "the whole model passed in INT8"
        found = alone[group.name]
        how = f"together with {', '.join(found.together)}" if found.together else "alone"
        said = f"{how} in INT8 it costs {found.lost:.4f} of the metric, cosine {found.cosine:.5f}"
        return said if group.name not in best.high else f"returned: {said}"

    groups = tuple(msgspec.structs.replace(group, reason=reason(group)) for group in plan.group)
    return msgspec.structs.replace(plan, group=groups, summary=summary)


def frontier(done: Sequence[Evaluated]) -> Iterator[int]:
    """Yield the places of those that no other beats in both speed and score."""
    places = [i for i, found in enumerate(done) if found.step != "alone"]
    for i in places:
        beaten = any(
            pace(done[j]) >= pace(done[i])
            and done[j].kept >= done[i].kept
            and (pace(done[j]), done[j].kept) != (pace(done[i]), done[i].kept)
            for j in places
        )
        if not beaten:
            yield i
