"""The fastest precision plan above a gate, found within a number of evaluations.

1. Schemes: the whole model in INT8 by each scheme that the machine may like. On a CPU each is timed beside
   FP32 first, and one that is not faster is not evaluated.
2. Ranking: each group alone in INT8, measured on the metric and by cosine.
3. Greedy: the least number of groups, worst first, that must return to high precision. What the metric
   says of a prefix of the ranking is found by halving.
4. Pareto: the rest of the evaluations goes to taking groups back, the largest first, while the gate holds.

Every evaluation is of a real file. Where latency cannot be measured here (a TensorRT target), the share of
INT8 weights stands in for it, only to order what is tried; the device decides by timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from edgeglm.calibration.conversion import Prepared, int8_by_plan
from edgeglm.calibration.groups import Group, joined_groups
from edgeglm.calibration.ort_calls import Ranges
from edgeglm.calibration.plan import Embeddings, PlanGroup, PrecisionPlan
from edgeglm.calibration.schemes import Method, Scheme
from edgeglm.calibration.scoring import Measure
from edgeglm.calibration.speed import MIN_GAIN, Speedup
from edgeglm.core.progress import Progress, QuietProgress, Task

Step = Literal["scheme", "alone", "greedy", "pareto"]
_SPARES = 3
_CLEARLY = 1.1  # two timings of one file differ by several percent


class Evaluated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file that was made and measured.

    Attributes:
        step: What it was made for.
        scheme, methods: How.
        high: Groups in high precision.
        int8_share: Share of the weights that are INT8.
        score: The metric's value; cosine without a metric.
        kept: Score over FP32's.
        cosine: Mean cosine to FP32 on samples that no range was found on.
        speedup: Over FP32 on this machine; None where it was not measured.
        passed: Whether it is above the gate.
    """

    step: Step
    scheme: str
    method: Method
    high: tuple[str, ...]
    int8_share: float
    score: float
    kept: float
    cosine: float
    speedup: float | None
    passed: bool


class Ranked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one group costs when it alone is INT8: metric lost (of FP32's) and cosine."""

    group: str
    nodes: tuple[str, ...]
    lost: float
    cosine: float


class SearchReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of a search.

    Attributes:
        gate: The least share of FP32's score that passes.
        baseline: FP32's score.
        evaluations: In the order in which they were made; the same every time but for ``speedup``.
        ranking: The most harmful group first; empty if no ranking was needed.
        frontier: Places in ``evaluations`` of those that no other beats in both speed and score.
        chosen: The plan, or None when nothing passes the gate.
        others: The next best that pass, for the case that the chosen one's final file does not: on a
            TensorRT target that one computes in FP16 besides, and what was measured in FP32.
        reason: Why that, or why nothing.
    """

    gate: float
    baseline: float
    evaluations: tuple[Evaluated, ...]
    ranking: tuple[Ranked, ...]
    frontier: tuple[int, ...]
    chosen: PrecisionPlan | None
    reason: str
    others: tuple[PrecisionPlan, ...] = ()


@dataclass
class _Search:
    prepared: Prepared
    ranges: Ranges
    measure: Measure
    speedup: Speedup | None
    gate: float
    baseline: float
    budget: int
    scratch: Path
    task: Task
    high_precision: Literal["fp32", "fp16"]
    smooth: float
    embeddings: Embeddings
    make: Callable[[Path, PrecisionPlan], object] | None
    groups: tuple[Group, ...]
    done: list[Evaluated] = field(default_factory=list)
    plans: list[PrecisionPlan] = field(default_factory=list)
    known: dict[tuple[str, str, tuple[str, ...]], Evaluated] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.budget - len(self.done)

    def plan(self, scheme: str, method: Method, high: Sequence[str]) -> PrecisionPlan:
        groups = tuple(
            PlanGroup(
                name=group.name,
                nodes=group.nodes,
                method=method,
                precision="high" if group.name in high else "int8",
            )
            for group in self.groups
        )
        return PrecisionPlan(
            source_sha256=self.prepared.sha256,
            scheme=scheme,
            high_precision=self.high_precision,
            smooth=self.smooth,
            embeddings=self.embeddings,
            group=groups,
        )

    def file(self, plan: PrecisionPlan) -> Path:
        path = self.scratch / "candidate.onnx"
        if self.make is not None:
            self.make(path, plan)
        else:
            int8_by_plan(self.prepared, path, plan, self.ranges)
        return path

    def evaluated(self, step: Step, scheme: str, method: Method, high: Sequence[str]) -> Evaluated:
        """Make, measure and remember one file; one that is known costs nothing."""
        key = (scheme, method, tuple(sorted(high)))
        if key in self.known:
            return self._for_use(key, step)
        plan = self.plan(scheme, method, high)
        path = self.file(plan)
        score, parity = self.measure(path)
        kept = score / self.baseline if self.baseline > 0 else float("nan")
        total = sum(group.weights for group in self.groups)
        # Alone, a group shows what it costs; nobody would ship it, so its time is not taken.
        speedup = self.speedup(path) if self.speedup and step != "alone" else None
        found = Evaluated(
            step=step,
            scheme=scheme,
            method=method,
            high=tuple(sorted(high)),
            int8_share=round(sum(g.weights for g in self.groups if g.name not in high) / total, 4),
            score=score,
            kept=kept,
            cosine=parity.mean_cosine,
            speedup=None if speedup is None else round(speedup, 3),
            passed=kept >= self.gate,
        )
        self.known[key] = found
        self.done.append(found)
        self.plans.append(plan)
        self.task.advance()
        self.task.note(f"{step}: kept {kept:.4f}")
        return found

    def _for_use(self, key: tuple[str, str, tuple[str, ...]], step: Step) -> Evaluated:
        """Return what is known of a file. One that was made to rank a group may turn out to be of use."""
        known = self.known[key]
        if known.step != "alone" or step == "alone":
            return known
        place = self.done.index(known)
        speedup = round(self.speedup(self.file(self.plans[place])), 3) if self.speedup else None
        found = msgspec.structs.replace(known, step=step, speedup=speedup)
        self.known[key] = self.done[place] = found
        return found


def search_plan(
    prepared: Prepared,
    ranges: Ranges,
    schemes: Sequence[Scheme],
    *,
    measure: Measure,
    baseline: float,
    gate: float,
    scratch: Path,
    speedup: Speedup | None = None,
    methods: Sequence[Method] = ("max",),
    evaluations: int = 40,
    high_precision: Literal["fp32", "fp16"] = "fp32",
    smooth: float = 0.0,
    embeddings: Embeddings = "high",
    make: Callable[[Path, PrecisionPlan], object] | None = None,
    progress: Progress | None = None,
) -> SearchReport:
    """Find the fastest plan that keeps ``gate`` of the baseline.

    Args:
        prepared: The model.
        ranges: By every one of ``methods``.
        schemes: What to try, the likeliest first.
        measure: Gives a file's score and its cosine to FP32.
        baseline: FP32's score.
        gate: The least share of it.
        scratch: An existing folder.
        speedup: Times a file beside FP32; None where this machine is not the target.
        methods: How ranges may be found.
        evaluations: The most files to measure on the metric; timing one is none.
        high_precision: What plans say about the rest of the graph.
        smooth: SmoothQuant's alpha, with which ``prepared`` was made.
        embeddings: What plans say about embedding tables.
        make: Writes the file of a plan, where ONNX Runtime's quantizers cannot (FP8).
        progress: Told of each evaluation.
    """
    with (progress or QuietProgress()).task("Searching a precision plan", total=evaluations) as task:
        groups = joined_groups(prepared.groups, max(2, evaluations // 2))
        search = _Search(
            prepared=prepared,
            ranges=ranges,
            measure=measure,
            speedup=speedup,
            gate=gate,
            baseline=baseline,
            budget=max(1, evaluations),
            scratch=scratch,
            task=task,
            high_precision=high_precision,
            smooth=smooth,
            embeddings=embeddings,
            make=make,
            groups=tuple(groups),
        )
        paying = _paying(search, schemes)
        starts = _starts(search, paying, methods)
        ranking: tuple[Ranked, ...] = ()
        best = min(starts, key=lambda e: (e.passed, _pace(e)), default=None)
        wanted = [e for e in starts if not e.passed and (best is None or _worth(e, starts))]
        if wanted and len(groups) > 1:
            lead = max(wanted, key=_pace)
            ranking = _ranking(search, lead)
            for start in sorted(wanted, key=_pace, reverse=True):
                _greedy(search, start, ranking)
        return _concluded(search, ranking, bool(paying))


def _pace(found: Evaluated) -> float:
    """Order by measured speed, else by how much is INT8."""
    return found.speedup if found.speedup is not None else found.int8_share


def _worth(found: Evaluated, starts: Sequence[Evaluated]) -> bool:
    """Whether a failing start may still beat the fastest that passes: only then is it mended."""
    passing = [_pace(e) for e in starts if e.passed]
    return not passing or _pace(found) > _CLEARLY * max(passing)


def _paying(search: _Search, schemes: Sequence[Scheme]) -> list[Scheme]:
    """Return the schemes that are faster than FP32 with everything in INT8; all, where nothing is timed."""
    if search.speedup is None:
        return list(schemes)
    gains = []
    for scheme in schemes:
        search.task.note(f"timing {scheme.name}")
        path = search.file(search.plan(scheme.name, "max", ()))
        gains.append((search.speedup(path), scheme))
    return [scheme for gain, scheme in gains if gain > MIN_GAIN]


def _starts(search: _Search, schemes: Sequence[Scheme], methods: Sequence[Method]) -> list[Evaluated]:
    """Measure the whole model in INT8 by every scheme and method; a quarter of the budget at most."""
    found: list[Evaluated] = []
    limit = max(1, search.budget // 4)
    for method in methods:
        for scheme in schemes:
            if len(found) < limit and (scheme.activation in ("uint8", "int8") or method == methods[0]):
                found.append(search.evaluated("scheme", scheme.name, method, ()))
    best: dict[str, Evaluated] = {}  # the method that keeps most, of each scheme
    for one in found:
        if one.scheme not in best or one.kept > best[one.scheme].kept:
            best[one.scheme] = one
    return list(best.values())


def _ranking(search: _Search, start: Evaluated) -> tuple[Ranked, ...]:
    """Measure each group alone in INT8, within half of what is left; the most harmful first."""
    groups = list(search.groups)
    alone = max(1, min(len(groups), search.left * 2 // 3))
    clusters = joined_groups(groups, alone)
    ranked = []
    for cluster in clusters:
        inside = set(cluster.nodes)
        high = [group.name for group in groups if not inside & set(group.nodes)]
        found = search.evaluated("alone", start.scheme, start.method, high)
        for group in groups:
            if inside & set(group.nodes):
                ranked.append(
                    Ranked(group=group.name, nodes=group.nodes, lost=1.0 - found.kept, cosine=found.cosine)
                )
    return tuple(sorted(ranked, key=lambda r: (-r.lost, r.cosine, r.group)))


def _greedy(search: _Search, start: Evaluated, ranking: Sequence[Ranked]) -> None:
    """Find the shortest prefix of the ranking whose return to high precision passes, then take back."""
    names = [ranked.group for ranked in ranking]
    low, high = 0, len(names) - 1  # with `low` groups returned it fails; with all, nothing is INT8
    passing: Evaluated | None = None
    while high - low >= 1 and search.left > 0:
        middle = (low + high + 1) // 2
        found = search.evaluated("greedy", start.scheme, start.method, names[:middle])
        if found.passed:
            passing, high = found, middle - 1
        else:
            low = middle
        if low >= high:
            break
    if passing is None:
        return
    returned = list(passing.high)
    sizes = {group.name: group.weights for group in search.groups}
    for name in sorted(returned, key=lambda n: -sizes[n]):
        if search.left <= 0:
            return
        fewer = [other for other in returned if other != name]
        if search.evaluated("pareto", start.scheme, start.method, fewer).passed:
            returned = fewer


def _concluded(search: _Search, ranking: tuple[Ranked, ...], any_paid: bool) -> SearchReport:
    timed = search.speedup is not None
    candidates = [
        (evaluated, plan)
        for evaluated, plan in zip(search.done, search.plans, strict=True)
        if evaluated.step != "alone" and evaluated.passed
    ]
    candidates.sort(key=lambda found: (_pace(found[0]), found[0].kept), reverse=True)
    chosen: PrecisionPlan | None = None
    others: tuple[PrecisionPlan, ...] = ()
    if timed and not any_paid:
        reason = "no INT8 scheme is faster than FP32 on this machine"
    elif not candidates:
        reason = f"nothing keeps {search.gate:g} of FP32"
    else:
        best, plan = candidates[0]
        if timed and _pace(best) <= MIN_GAIN:
            reason = "what passes the gate is not faster than FP32 on this machine"
        else:
            speed = f", {best.speedup:.2f} x FP32's speed" if best.speedup is not None else ""
            reason = f"{best.scheme}: keeps {best.kept:.4f} of FP32, cosine {best.cosine:.4f}{speed}"
            chosen = _explained(plan, best, ranking, reason)
            others = tuple(_explained(p, e, ranking, reason) for e, p in candidates[1 : 1 + _SPARES])
    return SearchReport(
        gate=search.gate,
        baseline=search.baseline,
        evaluations=tuple(search.done),
        ranking=ranking,
        frontier=tuple(_frontier(search.done)),
        chosen=chosen,
        reason=reason,
        others=others,
    )


def _explained(
    plan: PrecisionPlan, best: Evaluated, ranking: Sequence[Ranked], summary: str
) -> PrecisionPlan:
    """Write into each group what was measured of it."""
    alone: Mapping[str, Ranked] = {ranked.group: ranked for ranked in ranking}

    def reason(group: PlanGroup) -> str:
        if group.name not in alone:
            return "the whole model passed in INT8"
        found = alone[group.name]
        said = f"alone in INT8 it costs {found.lost:.4f} of the metric, cosine {found.cosine:.5f}"
        return said if group.name not in best.high else f"returned: {said}"

    groups = tuple(msgspec.structs.replace(group, reason=reason(group)) for group in plan.group)
    return msgspec.structs.replace(plan, group=groups, summary=summary)


def _frontier(done: Sequence[Evaluated]) -> Iterator[int]:
    places = [i for i, found in enumerate(done) if found.step != "alone"]
    for i in places:
        beaten = any(
            _pace(done[j]) >= _pace(done[i])
            and done[j].kept >= done[i].kept
            and (_pace(done[j]), done[j].kept) != (_pace(done[i]), done[i].kept)
            for j in places
        )
        if not beaten:
            yield i
