"""The fastest precision plan above a gate, found within a number of evaluations.

1. Schemes: the whole model in INT8 by each scheme that the machine may like. Where this machine is the
   target each is timed first: beside FP16 on a GPU, beside FP32 on a CPU, where one that is not faster is
   not evaluated.
2. Ranking: each group alone in INT8, measured on the metric and by cosine.
3. Greedy: the least number of groups, worst first, that must return to high precision. What the metric
   says of a prefix of the ranking is found by halving.
4. Pareto: the rest of the evaluations goes to taking groups back, the largest first, while the gate holds.

Every evaluation is of a real file. Where latency cannot be measured here (a TensorRT target without its GPU),
the target's roofline stands in for it and picks the one INT8 plan; the device times its file beside FP16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from edgeglm.calibration.conversion import int8_by_plan
from edgeglm.calibration.groups import Group, joined_groups
from edgeglm.calibration.ort_calls import Ranges
from edgeglm.calibration.plan import Embeddings, PlanGroup, PrecisionPlan
from edgeglm.calibration.preparation import Prepared
from edgeglm.calibration.schemes import Method, Scheme
from edgeglm.calibration.scoring import Measure
from edgeglm.calibration.search_report import (
    Beside,
    Evaluated,
    Ranked,
    SchemeTime,
    SearchReport,
    Step,
    clearly_slower,
    explained,
    frontier,
    pace,
    reached_words,
    swiftest_first,
    worth_mending,
)
from edgeglm.calibration.speed import MIN_GAIN, Speedup
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.progress import Progress, QuietProgress, Task

_SPARES = 3


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
    shipped: Callable[[Path, PrecisionPlan], object] | None
    groups: tuple[Group, ...]
    gains: Mapping[str, float]
    timings: list[SchemeTime] = field(default_factory=list)
    unmade: dict[str, str] = field(default_factory=dict)
    done: list[Evaluated] = field(default_factory=list)
    plans: list[PrecisionPlan] = field(default_factory=list)
    known: dict[tuple[str, str, tuple[str, ...]], Evaluated] = field(default_factory=dict)
    gains_here: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)

    @property
    def least_gain(self) -> float:
        """What a timed file must be faster than; 0 where FP16 travels besides, for the device to choose."""
        return MIN_GAIN if self.shipped is None else 0.0

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

    def gain(self, group: Group) -> float:
        """What INT8 saves of a group by the roofline; without one, its weights."""
        found = sum(self.gains.get(node, 0.0) for node in group.nodes)
        return found if found > 0 else group.weights * 1e-15

    def file(self, plan: PrecisionPlan) -> Path:
        path = self.scratch / "candidate.onnx"
        if self.make is not None:
            self.make(path, plan)
        else:
            int8_by_plan(self.prepared, path, plan, self.ranges)
        return path

    def timed(self, path: Path, plan: PrecisionPlan) -> float | None:
        """Return how much faster than its reference the file of a plan is; None where nothing times it."""
        if self.speedup is None:
            return None
        if self.shipped is None:
            return round(self.speedup(path), 3)
        kind = (plan.scheme, tuple(plan.int8_nodes))
        if kind not in self.gains_here:  # ranges do not change what is computed, and an engine takes long
            travels = self.scratch / "shipped.onnx"
            self.shipped(travels, plan)
            self.gains_here[kind] = round(self.speedup(travels), 3)
        return self.gains_here[kind]

    def timed_or_refused(self, path: Path, plan: PrecisionPlan) -> float | None:
        """Do so, and take a file that the builder refuses for one without speed: it cannot be chosen."""
        try:
            return self.timed(path, plan)
        except UserError:
            raise
        except EdgeglmError as error:
            self.task.note(str(error))
            return 0.0

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
        whole = sum(self.gain(group) for group in self.groups)
        # Alone, a group shows what it costs; nobody would ship it, so its time is not taken.
        speedup = None if step == "alone" else self.timed_or_refused(path, plan)
        found = Evaluated(
            step=step,
            scheme=scheme,
            method=method,
            high=tuple(sorted(high)),
            int8_share=round(sum(g.weights for g in self.groups if g.name not in high) / total, 4),
            saved=round(sum(self.gain(g) for g in self.groups if g.name not in high) / whole, 4),
            score=score,
            kept=kept,
            cosine=parity.mean_cosine,
            speedup=speedup,
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
        plan = self.plans[place]
        speedup = self.timed_or_refused(self.file(plan), plan) if self.speedup else None
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
    shipped: Callable[[Path, PrecisionPlan], object] | None = None,
    gains: Mapping[str, float] | None = None,
    rank: bool = False,
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
        speedup: Times a file beside FP32, or FP16 on a GPU; None where this machine is not the target.
        methods: How ranges may be found.
        evaluations: The most files to measure on the metric; timing one is none.
        high_precision: What plans say about the rest of the graph.
        smooth: SmoothQuant's alpha, with which ``prepared`` was made.
        embeddings: What plans say about embedding tables.
        make: Writes the file of a plan, where ONNX Runtime's quantizers cannot (FP8).
        shipped: For TensorRT, writes the file that travels, which is not the one that is measured. It is
            timed, and need not beat anything: FP16 travels besides.
        gains: Node -> seconds that INT8 saves by the roofline, to order what is tried.
        rank: Measure each group alone even where the whole model passes.
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
            shipped=shipped,
            groups=tuple(groups),
            gains=gains or {},
        )
        paying = _paying(search, schemes)
        starts = _starts(search, paying, methods)
        ranking: tuple[Ranked, ...] = ()
        wanted = swiftest_first([e for e in starts if not e.passed and worth_mending(e, starts)])
        if wanted and len(groups) > 1:
            ranking = _ranking(search, wanted[0])
            for start in wanted:
                _greedy(search, start, ranking)
        elif rank and starts and len(groups) > 1:
            ranking = _ranking(search, swiftest_first(starts)[0])
        return _concluded(search, ranking, bool(paying))


def _paying(search: _Search, schemes: Sequence[Scheme]) -> list[Scheme]:
    """Return the schemes that pay with everything in INT8; all, where nothing is timed.

    They keep their order, but for those that another is clearly faster than: they come last. A scheme whose
    quantizer fails is left out; where all fail, the first error is raised.
    """
    if search.speedup is None:
        return list(schemes)
    errors = []
    for scheme in schemes:
        search.task.note(f"timing {scheme.name}")
        try:
            plan = search.plan(scheme.name, "max", ())
            gain = search.timed(search.file(plan), plan)
        except UserError:
            raise
        except EdgeglmError as error:
            errors.append(error)
            search.unmade[scheme.name] = str(error)
            continue
        assert gain is not None, "something times files here"
        search.timings.append(SchemeTime(scheme=scheme.name, speedup=gain))
    if errors and not search.timings:
        raise errors[0]
    gains = {timed.scheme: timed.speedup for timed in search.timings}
    paying = [scheme for scheme in schemes if gains.get(scheme.name, 0.0) > search.least_gain]
    return sorted(paying, key=lambda scheme: clearly_slower(gains[scheme.name], gains.values()))


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
    """Measure each group alone in INT8, or with neighbours, within two thirds of what is left.

    The most harmful is first.
    """
    groups = list(search.groups)
    alone = max(1, min(len(groups), search.left * 2 // 3))
    clusters = joined_groups(groups, alone)
    ranked = []
    for cluster in clusters:
        inside = set(cluster.nodes)
        high = [group.name for group in groups if not inside & set(group.nodes)]
        found = search.evaluated("alone", start.scheme, start.method, high)
        members = [group for group in groups if inside & set(group.nodes)]
        ranked += [
            Ranked(
                group=group.name,
                nodes=group.nodes,
                lost=1.0 - found.kept,
                cosine=found.cosine,
                together=tuple(other.name for other in members if other is not group),
            )
            for group in members
        ]
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
    sizes = {group.name: search.gain(group) for group in search.groups}
    for name in sorted(returned, key=lambda n: (-sizes[n], n)):
        if search.left <= 0:
            return
        fewer = [other for other in returned if other != name]
        if search.evaluated("pareto", start.scheme, start.method, fewer).passed:
            returned = fewer


def _concluded(search: _Search, ranking: tuple[Ranked, ...], any_paid: bool) -> SearchReport:
    timed = search.speedup is not None
    beside: Beside = "fp32" if search.shipped is None else "fp16"
    passed = [found for found in search.done if found.step != "alone" and found.passed]
    paid = [found for found in passed if not timed or pace(found) > search.least_gain]
    plans = {id(found): plan for found, plan in zip(search.done, search.plans, strict=True)}
    candidates = [(found, plans[id(found)]) for found in swiftest_first(paid, by_score=True)]
    chosen: PrecisionPlan | None = None
    others: tuple[PrecisionPlan, ...] = ()
    if timed and not any_paid:
        reason = "no INT8 scheme is faster than FP32 on this machine"
    elif not passed:
        reason = f"nothing keeps {search.gate:g} of FP32"
    elif not candidates:
        reason = "what passes the gate is not faster than FP32 on this machine"
    else:
        best, plan = candidates[0]
        reason = reached_words(best.scheme, best.kept, best.cosine, best.speedup, beside)
        chosen = explained(plan, best, ranking, reason)
        others = tuple(explained(p, e, ranking, reason) for e, p in candidates[1 : 1 + _SPARES])
    return SearchReport(
        gate=search.gate,
        baseline=search.baseline,
        evaluations=tuple(search.done),
        ranking=ranking,
        frontier=tuple(frontier(search.done)),
        chosen=chosen,
        reason=reason,
        others=others,
        timings=tuple(search.timings),
        unmade=search.unmade,
        order="timed" if timed else "roofline",
        beside=beside,
    )
