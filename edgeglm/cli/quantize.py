"""`edgeglm quantize`: any FP32 ONNX file to the INT8 file that keeps its accuracy and pays."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.calibrate import DRAWING, METHODS, drawing_options, note_repeated
from edgeglm.cli.console import App, json_option
from edgeglm.cli.unused_options import refuse_options
from edgeglm.core.words import human_bytes

if TYPE_CHECKING:
    from edgeglm.calibration.drawing import Drawing
    from edgeglm.calibration.feeds import Batches
    from edgeglm.calibration.origin import Origin
    from edgeglm.calibration.outcome import Outcome
    from edgeglm.calibration.plan import PrecisionPlan
    from edgeglm.calibration.search_report import Ranked, SearchReport
    from edgeglm.compile.clock import GpuClock

_OPS = ("Conv", "Gemm", "MatMul")
_SHOWN = 12  # rows of a ranking on the terminal; report.json has all


@click.command(name="quantize")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="A calibration set, or samples.")
@click.option("--target", "target_name", default="cpu", show_default=True, help="See edgeglm targets.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--metric", help="module:function, called with a file's path; higher is better.")
@click.option("--gate", type=click.FloatRange(0, 1), default=0.99, show_default=True, help="Of FP32's score.")
@click.option("--evaluations", type=click.IntRange(1), default=40, show_default=True, help="Most files.")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="Ranges; may repeat.")
@click.option("--scheme", default="", help="One INT8 scheme instead of all that the target may like.")
@click.option(
    "--smooth", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="SmoothQuant's alpha."
)
@click.option("--embeddings", type=click.Choice(("high", "int8", "int4")), default="high", help="Tables.")
@click.option(
    "--op", "op_types", multiple=True, type=click.Choice(_OPS), help="Products that may be INT8; may repeat."
)
@click.option("--rank", is_flag=True, help="Measure each part alone, even if the whole model passes.")
@click.option("--precision-plan", type=click.Path(path_type=Path), help="Apply this plan; no search.")
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="CPU threads.")
@drawing_options
@json_option
@click.pass_obj
def command(
    app: App,
    model: Path,
    data: Path,
    target_name: str,
    output: Path,
    metric: str | None,
    gate: float,
    evaluations: int,
    methods: tuple[str, ...],
    scheme: str,
    smooth: float,
    embeddings: str,
    op_types: tuple[str, ...],
    rank: bool,
    precision_plan: Path | None,
    threads: int,
    tokenizer: Path | None,
    drawing: Drawing,
) -> None:
    """Quantize MODEL for a target and write model.onnx, plan.toml and report.json into a folder.

    For a TensorRT target fp16.onnx comes with them, for the device to time both. Where GPU 0 of this machine
    is that target, plans are timed here, as they are on the CPU; elsewhere its roofline orders them.

    DATA is a set that edgeglm calibrate wrote, or samples as it takes them. Without --metric the gate
    is on the mean cosine to FP32. Exits with 3, and writes nothing, when no plan passes the gate or
    none is faster than FP32 on the CPU.
    """
    import msgspec

    from edgeglm.calibration.any_model import quantize_onnx, require_free
    from edgeglm.calibration.drawing import is_calibration_set
    from edgeglm.calibration.outcome import Settings
    from edgeglm.calibration.plan import plan_from_file
    from edgeglm.calibration.scoring import metric_from_name
    from edgeglm.compile.clock import gpu_clock
    from edgeglm.targets.schema import load_target

    if precision_plan is not None:
        refuse_options(
            ("methods", "scheme", "smooth", "embeddings", "op_types", "evaluations", "rank"),
            "the plan says that; edit the plan, or leave --precision-plan out",
        )
    if is_calibration_set(data):
        refuse_options(DRAWING, "the set was drawn already; give samples, or draw another set")
    require_free(output, model, data, *([] if tokenizer is None else [tokenizer]))
    target = load_target(target_name)
    settings = msgspec.convert(
        {
            "gate": gate,
            "evaluations": evaluations,
            "methods": methods or METHODS,
            "scheme": scheme,
            "threads": threads,
            "smooth": smooth,
            "embeddings": embeddings,
            "op_types": op_types or _OPS,
            "rank": rank,
        },
        Settings,
    )
    if scheme == "fp8" and set(methods) - {"max"}:
        raise click.UsageError("--scheme fp8 finds ranges by the largest value; leave --method out")
    if scheme.startswith("dynamic"):
        refuse_options(("methods",), f"--scheme {scheme} finds ranges at run time; leave --method out")
    plan = None if precision_plan is None else plan_from_file(precision_plan)
    function = None if metric is None else metric_from_name(metric)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeglm-samples-")))
        batches, origin = _batches(app, model, data, scratch, drawing, tokenizer)
        if origin.source == "random":
            app.note("the ranges come from RANDOM NUMBERS; do not ship this file")
        outcome = quantize_onnx(
            model,
            batches,
            output,
            target=target,
            settings=settings,
            metric=function,
            metric_name=metric or "cosine",
            plan=plan,
            origin=origin,
            clock=_said(app, gpu_clock(target, progress=app.progress)),
            progress=app.progress,
        )
    _show(app, outcome, output)
    if plan is not None and not outcome.passed:
        _reasons(app, plan)
    app.emit(msgspec.to_builtins(outcome))
    _require_passed(outcome, target.kind == "cpu", searched=plan is None)


def _said(app: App, clock: GpuClock | None) -> GpuClock | None:
    if clock is not None:
        app.note(f"plans are timed by {clock.words}")
    return clock


def _batches(
    app: App, model: Path, data: Path, scratch: Path, drawing: Drawing, tokenizer: Path | None
) -> tuple[Batches, Origin]:
    from edgeglm.calibration.drawing import (
        TOWER,
        calibration_set_for_model,
        is_calibration_set,
        tower_for_model,
    )
    from edgeglm.calibration.origin import origin_of
    from edgeglm.calibration.sets import open_calibration_set

    if is_calibration_set(data):
        found = open_calibration_set(data)
        tower = tower_for_model(found, model)
    else:
        found = calibration_set_for_model(data, model, scratch / "set", drawing=drawing, tokenizer=tokenizer)
        tower = TOWER
    note_repeated(app, found.record.towers[tower])
    return found.batches(tower), origin_of(found, tower)


def _show(app: App, outcome: Outcome, output: Path) -> None:
    report = outcome.search
    _timings(app, report)
    _ranking(app, report)
    _evaluations(app, report)
    if outcome.passed:
        app.print(
            f"{output / 'model.onnx'}: keeps {outcome.kept:.4f} of FP32, cosine {outcome.cosine:.5f}"
            f"{_speed(outcome)}, {human_bytes(outcome.source_bytes)} -> "
            f"{human_bytes(outcome.size_bytes)}"
        )
        if outcome.left_high:
            app.note(
                f"ModelOpt leaves {_listed(outcome.left_high)} in high precision, whatever the plan says: so "
                "narrow a product, or of so few rows, gains nothing on Tensor Cores"
            )
        if outcome.fp32_nodes:
            app.note(
                f"the builder must keep {len(outcome.fp32_nodes)} nodes in FP32 if it may choose FP16 "
                "(fp32_nodes in report.json; trtexec --layerPrecisions)"
            )
        if outcome.fp16 is not None:
            app.print(
                f"{output / 'fp16.onnx'}: keeps {outcome.fp16.kept:.4f} of FP32, cosine "
                f"{outcome.fp16.cosine:.5f}, {human_bytes(outcome.fp16.size_bytes)}; {_both(outcome)}"
            )
        elif outcome.fp16_left_out:
            app.note(f"no FP16 file: {outcome.fp16_left_out}")
        app.print(f"{output / 'plan.toml'}: edit it and give it back with --precision-plan")


def _speed(outcome: Outcome) -> str:
    if outcome.speedup is None:
        return ""
    return f", {outcome.speedup:.2f} x {outcome.search.beside.upper()}'s speed here"


def _both(outcome: Outcome) -> str:
    if outcome.speedup is not None and outcome.speedup <= 1.0:
        return "it is the faster of the two here"
    return "the device times both"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _timings(app: App, report: SearchReport) -> None:
    """Show what every scheme gains, which is all there is to see where none does."""
    for scheme, why in report.unmade.items():
        app.note(f"{scheme} was left out: {why}")
    if report.timings:
        rows = [(timed.scheme, f"{timed.speedup:.2f}") for timed in report.timings]
        app.table(["the whole model by scheme", f">x {report.beside.upper()} here"], rows)
    elif report.order == "roofline" and report.evaluations:
        app.note(
            "speed is not measured here: the roofline picks the INT8 plan, and the device times its file"
        )


def _ranking(app: App, report: SearchReport) -> None:
    if report.ranking:
        app.table(
            [f"alone in INT8, the {_SHOWN} most harmful", ">lost", ">cosine"],
            [(_ranked(r), f"{r.lost:+.4f}", f"{r.cosine:.5f}") for r in report.ranking[:_SHOWN]],
        )


def _ranked(found: Ranked) -> str:
    return f"{found.group}, together with {', '.join(found.together)}" if found.together else found.group


def _reasons(app: App, plan: PrecisionPlan) -> None:
    """Show what a plan that did not pass says of its groups: those in INT8 first."""
    groups = sorted(plan.group, key=lambda group: group.precision == "high")[:_SHOWN]
    app.table(
        [f"groups of the plan, {len(groups)} of {len(plan.group)}", "precision", "ranges", "reason"],
        [(group.name, group.precision, group.method, group.reason or "none given") for group in groups],
    )


def _evaluations(app: App, report: SearchReport) -> None:
    rows = [
        (
            found.scheme,
            found.method,
            len(found.high),
            f"{found.int8_share:.0%}",
            f"{found.kept:.4f}",
            f"{found.cosine:.5f}",
            "-" if found.speedup is None else f"{found.speedup:.2f}",
            ("passed, on the frontier" if i in report.frontier else "passed") if found.passed else "below",
        )
        for i, found in enumerate(report.evaluations)
        if found.step != "alone"
    ]
    if rows:
        headings = [
            "scheme",
            "ranges",
            ">high",
            ">INT8",
            ">kept",
            ">cosine",
            f">x {report.beside.upper()}",
            f"gate {report.gate:g}",
        ]
        app.table(headings, rows)


def _require_passed(outcome: Outcome, on_cpu: bool, *, searched: bool) -> None:
    from edgeglm.core.errors import GateError

    if not outcome.passed:
        remedy = "lower --gate, give more samples or more --evaluations"
        if not searched:
            remedy = 'set precision = "high" for a group that costs much, or search without --precision-plan'
        if on_cpu and "faster" in outcome.search.reason:
            remedy = "use the FP32 model on this machine"
        raise GateError(f"{outcome.search.reason}; nothing was written, {remedy}")
