"""What candidates are asked for, and what is reported of them: the words of ``variants.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgeglm.calibration.plan import PrecisionPlan
from edgeglm.calibration.precision import ConversionReport, HighPrecision
from edgeglm.calibration.schemes import Method
from edgeglm.calibration.search_report import SearchReport
from edgeglm.evaluate.parity import Parity

Precision = Literal["fp32", "fp16", "int8"]
TOWERS = ("image", "text")
REPORT_NAME = "variants.json"

Metrics = Mapping[str, Any]
#: Given a variant's name and its files, return the metrics measured on these files.
Evaluate = Callable[[str, Mapping[str, Path]], Metrics]


class QuantizeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How candidates are made.

    Attributes:
        candidates: Variants besides FP32, in the order in which they are tried.
        schemes: Tower -> names of INT8 schemes instead of its policy: on a CPU the ones of ONNX Runtime,
            whose INT8 kernels a Q/DQ file of ModelOpt does not reach. Each is timed beside FP32, and the
            fastest makes the file; a tower that none is faster for stays in high precision.
        methods: How ranges are found under a scheme: tried in turn until the gate passes.
        plans: Tower -> a plan that somebody wrote or a search found; taken as it is.
        search_evaluations: The most files that the search for one tower's plan measures, where both
            towers whole in INT8 fail; 0 for no search.
        minimum_score: The score that both towers together must keep; the search asks each for half the loss.
        policies: Tower -> name of its shipped INT8 policy, where there is no scheme.
        high_precision: What INT8 graphs compute in elsewhere: "fp16" for TensorRT (on every SM),
            "fp32" for ONNX Runtime on a CPU, where FP16 is slow.
        fp16_samples: Samples that AutoCast looks at; it holds every tensor of all of them.
        held_out: Calibration samples kept out of the ranges, for the cosine of each file.
    """

    candidates: tuple[Literal["fp16", "int8"], ...] = ("fp16", "int8")
    schemes: dict[str, tuple[str, ...]] = {}
    methods: tuple[Method, ...] = ("max",)
    plans: dict[str, PrecisionPlan] = {}
    search_evaluations: int = 0
    minimum_score: float = 0.99
    policies: dict[str, str] = msgspec.field(
        default_factory=lambda: {"image": "linear-and-conv", "text": "expanding"}
    )
    high_precision: HighPrecision = "fp16"
    fp16_samples: int = 16
    held_out: int = 16


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a variant may be packed, its score (higher is better) and why."""

    passed: bool
    score: float
    reason: str


#: Given a folder and a tower's name, write that tower into it in FP32, trained to bear INT8.
Tune = Callable[[Path, str], None]
#: Given the metrics of a variant and of FP32, decide.
Judge = Callable[[Metrics, Metrics], Verdict]


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One evaluation of a pair of files: per-tower precision, metrics of these files, the verdict.

    ``tuned`` towers went on learning while they were rounded; in those of ``residuals`` residual sums
    read INT8.
    """

    precisions: dict[str, Precision]
    sha256: dict[str, str]
    metrics: dict[str, Any]
    verdict: Verdict
    tuned: bool = False
    residuals: tuple[str, ...] = ()


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A variant that travels: ``models/<name>/<tower>.onnx``; ``tuned`` as in :class:`Trial`."""

    name: str
    precisions: dict[str, Precision]
    sha256: dict[str, str]
    size_bytes: dict[str, int]
    metrics: dict[str, Any]
    fidelity: dict[str, Parity]
    conversions: dict[str, ConversionReport]
    tuned: bool = False


class QuantizeReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``variants.json``: what travels, what was left out and why, and every evaluation made.

    ``speedups`` is tower -> scheme -> how many times faster than FP32 the whole tower was on this machine.
    ``seconds`` is the wall time of each candidate: its conversions and evaluations, in the order tried.
    ``searches`` is tower -> every file that the search for its plan measured, with the ranking of its groups.
    """

    variants: dict[str, Variant]
    left_out: dict[str, str]
    trials: dict[str, list[Trial]]
    speedups: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    searches: dict[str, SearchReport] = {}
