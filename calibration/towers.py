"""The files of both towers in every precision, each made when it is asked for and measured beside FP32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.calibration.conversion import file_by_plan, ranges_from_batches, whole_plan
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.ort_calls import Ranges
from edgeglm.calibration.plan import PrecisionPlan
from edgeglm.calibration.policy import policy_named
from edgeglm.calibration.precision import ConversionReport, fidelity, fp16_from_fp32, int8_from_fp32
from edgeglm.calibration.preparation import Prepared, prepared_model
from edgeglm.calibration.schemes import Method, Scheme, scheme_named
from edgeglm.calibration.search import search_plan
from edgeglm.calibration.search_report import SearchReport, clearly_slower
from edgeglm.calibration.sets import CalibrationSet
from edgeglm.calibration.speed import MIN_GAIN, Clock, Speedup, speedup_over, timed_feeds
from edgeglm.calibration.variants import TOWERS, Precision, QuantizeConfig
from edgeglm.core.progress import Progress
from edgeglm.evaluate.parity import Parity

#: Given the files of both towers, the share of FP32's score that they keep.
Score = Callable[[Mapping[str, Path]], float]


@dataclass(frozen=True, kw_only=True)
class TowerFile:
    """One file of one tower; ``report`` is None for FP32."""

    path: Path
    precision: Precision
    report: ConversionReport | None
    fidelity: Parity


@dataclass(kw_only=True)
class TowerFiles:
    """What makes the files.

    Attributes:
        fp32_dir: Holds ``image.onnx`` and ``text.onnx``; not changed.
        scratch: Where files go.
        calibration: Drawn from training samples.
        config: How files are made.
        progress: Told of each conversion and evaluation.
        clock: Times plans on the GPU of this machine, where a search for TensorRT may use it.
        speedups: Tower -> scheme -> how many times faster than FP32 the whole tower was here.
        searches: Tower -> all of the search for its plan, where there was one.
    """

    fp32_dir: Path
    scratch: Path
    calibration: CalibrationSet
    config: QuantizeConfig
    progress: Progress
    clock: Clock | None = None
    speedups: dict[str, dict[str, float]] = field(default_factory=dict)
    searches: dict[str, SearchReport] = field(default_factory=dict)
    _ready: dict[str, tuple[Prepared, Ranges]] = field(default_factory=dict)
    _schemes: dict[str, tuple[Scheme, ...]] = field(default_factory=dict)
    _by_policies: dict[Path, TowerFile] = field(default_factory=dict)

    def of_weights(self, folder: Path) -> TowerFiles:
        """Return what makes the files of other weights of the same graphs, in ``folder``.

        The schemes that pay are those of these graphs; they are not timed again.
        """
        scratch = folder / "made"
        scratch.mkdir()
        return TowerFiles(
            fp32_dir=folder,
            scratch=scratch,
            calibration=self.calibration,
            config=self.config,
            progress=self.progress,
            clock=self.clock,
            speedups=self.speedups,
            _schemes=dict(self._schemes),
        )

    def fp32(self, tower: str) -> TowerFile:
        """Return the file that everything is compared with."""
        path = self._source(tower)
        same = fidelity(path, path, self.calibration.batches(tower)[:1])
        return TowerFile(path=path, precision="fp32", report=None, fidelity=same)

    def fp16(self, tower: str) -> TowerFile:
        """Return a tower in FP16, made once."""
        out, record = self.scratch / f"{tower}-fp16.onnx", self.scratch / f"{tower}-fp16.json"
        if record.is_file():
            report = msgspec.json.decode(record.read_bytes(), type=ConversionReport)
        else:
            few = self.calibration.batches(tower, self.config.fp16_samples)
            report = fp16_from_fp32(self._source(tower), out, few)
            record.write_bytes(msgspec.json.encode(report))
        return self._measured(tower, out, "fp16", report)

    def high(self, tower: str) -> TowerFile:
        """Return a tower in high precision: FP16 where the target computes in it, FP32 on a CPU."""
        return self.fp16(tower) if self.config.high_precision == "fp16" else self.fp32(tower)

    def pays(self, tower: str) -> bool:
        """Whether its plan, or some scheme, is faster than FP32 here. What a device times is always tried."""
        if tower not in self.config.schemes:
            return True
        if tower not in self.config.plans:
            return bool(self.schemes(tower))
        timed = self.speedups.setdefault(tower, {})
        if "plan" not in timed:
            path = self.by_plan(tower, self.config.plans[tower]).path
            timed["plan"] = round(self._speedup(tower)(path), 3)
        return timed["plan"] > MIN_GAIN

    def schemes(self, tower: str) -> tuple[Scheme, ...]:
        """Return the schemes that are faster than FP32 here, the best first; each is timed once.

        The best is the likeliest that none is clearly faster than: two timings of a file differ a little,
        and a build should not depend on that.
        """
        if tower not in self._schemes:
            timed = self.speedups.setdefault(tower, {})
            for name in self.config.schemes.get(tower, ()):
                path = self._whole(tower, name, self.config.methods[0])[0]
                timed[name] = round(self._speedup(tower)(path), 3)
            paying = [name for name in timed if timed[name] > MIN_GAIN]
            paying.sort(key=lambda name: clearly_slower(timed[name], timed.values()))
            self._schemes[tower] = tuple(scheme_named(name) for name in paying)
        return self._schemes[tower]

    def has_residual_choice(self, tower: str) -> bool:
        """Whether residual sums may read INT8: where TensorRT computes, by a policy."""
        config = self.config
        by_policy = tower not in config.plans and tower not in config.schemes
        return by_policy and config.high_precision == "fp16"

    def is_open(self, tower: str) -> bool:
        """Whether another method may give another file."""
        if tower in self.config.plans or tower not in self.config.schemes or not self.pays(tower):
            return False
        return self.schemes(tower)[0].activation != "dynamic"

    def int8(self, tower: str, method: Method, *, residuals: bool = False) -> TowerFile:
        """Return a tower in INT8: by its plan, by its best scheme, else by its policy.

        With ``residuals``, residual sums of a policy's file read INT8 too.
        """
        config = self.config
        if tower not in config.plans and tower not in config.schemes:
            return self._by_policy(tower, residuals=residuals)
        if tower in config.plans:
            return self.by_plan(tower, config.plans[tower])
        timed = self.speedups.get(tower, {})
        best = self.schemes(tower)[0].name if self.schemes(tower) else max(timed, key=lambda n: timed[n])
        path, report = self._whole(tower, best, method)
        return self._measured(tower, path, "int8", report)

    def by_plan(self, tower: str, plan: PrecisionPlan) -> TowerFile:
        """Return a tower in INT8 by a plan."""
        prepared, ranges = self._ranged(tower)
        out = self.scratch / f"{tower}-plan.onnx"
        report = file_by_plan(prepared, out, plan, ranges, self._split(tower)[0])
        return self._measured(tower, out, "int8", report)

    def searched(self, tower: str, score: Score, gate: float) -> PrecisionPlan | None:
        """Search a plan that keeps ``gate``, the other tower in FP32; None if none is found."""
        prepared, ranges = self._ranged(tower)
        fp32 = {name: self._source(name) for name in TOWERS}
        on_cpu = tower in self.config.schemes
        held_out = self._split(tower)[1]

        def measure(path: Path) -> tuple[float, Parity]:
            return score({**fp32, tower: path}), fidelity(path, fp32[tower], held_out)

        self.searches[tower] = search_plan(
            prepared,
            ranges,
            self.schemes(tower) if on_cpu else (scheme_named("tensorrt"),),
            measure=measure,
            baseline=1.0,
            gate=gate,
            scratch=self.scratch,
            speedup=self._speedup(tower) if on_cpu else self._on_gpu(tower),
            shipped=None if on_cpu else self._writes(tower),
            methods=self.config.methods,
            evaluations=self.config.search_evaluations,
            high_precision=self.config.high_precision,
            progress=self.progress,
        )
        return self.searches[tower].chosen

    def _source(self, tower: str) -> Path:
        return self.fp32_dir / f"{tower}.onnx"

    def _speedup(self, tower: str) -> Speedup:
        return speedup_over(self._source(tower), self._split(tower)[1], threads=1)

    def _on_gpu(self, tower: str) -> Speedup | None:
        if self.clock is None:
            return None
        return self.clock(self.fp16(tower).path, timed_feeds(self._source(tower), self._split(tower)[1]))

    def _writes(self, tower: str) -> Callable[[Path, PrecisionPlan], object]:
        prepared, ranges = self._ranged(tower)
        return lambda path, plan: file_by_plan(prepared, path, plan, ranges, self._split(tower)[0])

    def _ranged(self, tower: str) -> tuple[Prepared, Ranges]:
        if tower not in self._ready:
            config = self.config
            prepared = prepared_model(self._source(tower))
            plan = config.plans.get(tower)
            written = () if plan is None else tuple(plan.int8_nodes.values())
            methods = tuple(dict.fromkeys((*config.methods, *written)))
            self._ready[tower] = prepared, ranges_from_batches(prepared, self._split(tower)[0], methods)
        return self._ready[tower]

    def _whole(self, tower: str, scheme: str, method: Method) -> tuple[Path, ConversionReport]:
        prepared, ranges = self._ranged(tower)
        plan = whole_plan(prepared, scheme, method, self.config.high_precision)
        out = self.scratch / f"{tower}-{scheme}-{method}.onnx"
        return out, file_by_plan(prepared, out, plan, ranges, self._split(tower)[0])

    def _by_policy(self, tower: str, *, residuals: bool) -> TowerFile:
        out = self.scratch / f"{tower}-int8{'-residuals' if residuals else ''}.onnx"
        if out not in self._by_policies:
            report = int8_from_fp32(
                self._source(tower),
                out,
                self._split(tower)[0],
                policy=policy_named(self.config.policies[tower]),
                high_precision=self.config.high_precision,
                residuals=residuals,
            )
            self._by_policies[out] = self._measured(tower, out, "int8", report)
        return self._by_policies[out]

    def _split(self, tower: str) -> tuple[Batches, Batches]:
        """Return the batches that ranges are found on, and those that the cosine is measured on.

        Both are the same where there is only one sample.
        """
        batches = self.calibration.batches(tower)
        if len(batches) == 1:
            return batches.halves() if batches.samples > 1 else (batches, batches)
        size = self.calibration.record.batch_size
        held = max(1, min(len(batches) // 2, -(-self.config.held_out // size)))
        return batches[:-held], batches[-held:]

    def _measured(
        self, tower: str, path: Path, precision: Precision, report: ConversionReport | Any
    ) -> TowerFile:
        measured = fidelity(path, self._source(tower), self._split(tower)[1])
        return TowerFile(path=path, precision=precision, report=report, fidelity=measured)
