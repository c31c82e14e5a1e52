"""One precision plan and one FP32 file to one INT8 file, without calibrating again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from edgeglm.calibration.embeddings import quantize_tables
from edgeglm.calibration.feeds import Feeds, batches_of
from edgeglm.calibration.groups import with_glue
from edgeglm.calibration.modelopt_calls import fp8_model
from edgeglm.calibration.opsets import keep_used_opsets
from edgeglm.calibration.ort_calls import (
    Ranges,
    dynamic_model,
    static_model,
)
from edgeglm.calibration.plan import PlanGroup, PrecisionPlan, require_fitting
from edgeglm.calibration.policy import Int8Policy
from edgeglm.calibration.precision import (
    LINTED,
    ConversionReport,
    int8_from_fp32,
    ready_for_fp16,
    require_legal,
    restore_inner_types,
)
from edgeglm.calibration.preparation import Prepared
from edgeglm.calibration.ranges import RangeCollector
from edgeglm.calibration.schemes import Method, scheme_named
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import EdgeglmError
from edgeglm.core.progress import Progress, QuietProgress, track
from edgeglm.export.anonymous import save_deterministic, strip_traces
from edgeglm.export.graph import Graph, sorted_nodes
from edgeglm.export.plain import why_illegal

if TYPE_CHECKING:
    import onnx


def whole_plan(
    prepared: Prepared, scheme: str, method: Method = "max", high_precision: Literal["fp32", "fp16"] = "fp32"
) -> PrecisionPlan:
    """Return the plan that puts every group in INT8."""
    groups = tuple(
        PlanGroup(name=group.name, nodes=group.nodes, precision="int8", method=method)
        for group in prepared.groups
    )
    return PrecisionPlan(
        source_sha256=prepared.sha256, scheme=scheme, high_precision=high_precision, group=groups
    )


def activations_of(prepared: Prepared) -> list[str]:
    """Return the activations whose ranges any plan may ask for: what products and glue read and make."""
    constants = {tensor.name for tensor in prepared.model.graph.initializer}
    nodes = set(with_glue(prepared.model, [n for group in prepared.groups for n in group.nodes]))
    known = {value.name: value for value in prepared.model.graph.value_info}
    known |= {v.name: v for v in (*prepared.model.graph.input, *prepared.model.graph.output)}
    found: dict[str, None] = {}
    for node in prepared.model.graph.node:
        if node.name in nodes:
            for name in (*node.input, *node.output):
                value = known.get(name)
                if (
                    name
                    and name not in constants
                    and (value is None or value.type.tensor_type.elem_type == 1)
                ):
                    found[name] = None
    return list(found)


def ranges_from_batches(
    prepared: Prepared,
    batches: Sequence[Feeds],
    methods: Sequence[Method],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Ranges:
    """Run the batches once and return the range of every activation by every method."""
    with RangeCollector(prepared.model, activations_of(prepared), methods, threads=threads) as collector:
        for feeds in track(progress or QuietProgress(), batches, "Finding ranges", len(batches)):
            collector.see(feeds)
        return collector.ranges()


def file_by_plan(
    prepared: Prepared, out: Path, plan: PrecisionPlan, ranges: Ranges, seen: Sequence[Feeds]
) -> ConversionReport:
    """Write the file that travels: by ONNX Runtime, or by ModelOpt where the plan's scheme is TensorRT's.

    ModelOpt's file has the same scales as ONNX Runtime's but computes the rest in the plan's high precision.

    Raises:
        UserError: The plan does not fit the model.
        EdgeglmError: A quantizer failed.
    """
    started = time.perf_counter()
    methods = plan.int8_nodes
    order = [node.name for node in prepared.model.graph.node if node.name in methods]
    scheme = scheme_named(plan.scheme)
    if scheme.activation == "float8":
        return _fp8_file(prepared, out, plan, order, seen)
    if scheme.maker == "modelopt":
        with tempfile.TemporaryDirectory(prefix="edgeglm-source-") as folder:
            source = Path(folder) / f"{prepared.path.stem}.onnx"  # with the names that the plan knows
            source_model = _without_shapes(prepared.model)
            quantize_tables(source_model, plan.embeddings)
            save_deterministic(source_model, source)
            made = int8_from_fp32(
                source,
                out,
                seen[:2],  # ModelOpt wants samples, though the ranges are known
                policy=Int8Policy(name="plan"),
                high_precision=plan.high_precision,
                nodes=order,
                ranges=_largest(prepared, methods, ranges),
                residuals=plan.residuals,
            )
        return msgspec.structs.replace(
            made, policy=None, plan=plan, source_sha256=prepared.sha256, samples=batches_of(seen)
        )
    int8_by_plan(prepared, out, plan, ranges)
    return ConversionReport(
        sha256=sha256_file(out),
        source_sha256=prepared.sha256,
        precision="int8",
        high_precision="fp32",
        plan=plan,
        quantized_nodes=tuple(order),
        weights=len(order),
        samples=batches_of(seen),
        batches=len(seen),
        size_bytes=out.stat().st_size,
        seconds=round(time.perf_counter() - started, 3),
    )


def _fp8_file(
    prepared: Prepared, out: Path, plan: PrecisionPlan, order: list[str], seen: Sequence[Feeds]
) -> ConversionReport:
    """Write the FP8 file by ModelOpt, which finds the ranges itself, by the largest value."""
    started = time.perf_counter()
    require_fitting(plan, prepared.sha256, {node for group in prepared.groups for node in group.nodes})
    with tempfile.TemporaryDirectory(prefix="edgeglm-source-") as folder:
        source = Path(folder) / "fp32.onnx"
        source_model = _without_shapes(prepared.model)
        quantize_tables(source_model, plan.embeddings)
        save_deterministic(source_model, source)
        ready, lint = ready_for_fp16(source, Path(folder), seen[:LINTED])
        try:
            model, said = fp8_model(ready, seen, nodes=order, keep_fp32=lint.keep_fp32)
        except EdgeglmError:
            raise
        except Exception as error:  # ModelOpt raises whatever its parts raise
            raise EdgeglmError(
                f"ModelOpt cannot make the FP8 variant of {prepared.path.name}: {error}; use another scheme"
            ) from error
    strip_traces(model)
    model.graph.ClearField("value_info")
    restore_inner_types(model, source_model)
    require_legal(model, prepared.path.name)
    save_deterministic(model, out)
    graph = Graph(model)
    made = [n.name for n in graph.nodes if n.name in order and graph.quantizers_before(n.input[0])]
    return ConversionReport(
        sha256=sha256_file(out),
        source_sha256=prepared.sha256,
        precision="fp8",
        high_precision="fp16",
        plan=plan,
        quantized_nodes=tuple(made),
        lint=lint,
        weights=len(made),
        samples=batches_of(seen),
        batches=len(seen),
        size_bytes=out.stat().st_size,
        said=tuple(said),
        seconds=round(time.perf_counter() - started, 3),
    )


def _without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.ClearField("value_info")
    for value in copy.graph.input:  # ModelOpt compares dimensions, and a free one without a name is none
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and not dim.dim_param:
                dim.dim_param = f"{value.name}_{axis}"
    return copy


def _largest(prepared: Prepared, methods: Mapping[str, Method], ranges: Ranges) -> dict[str, float]:
    found = {}
    for node in prepared.model.graph.node:
        if node.name in methods and node.input[0] in ranges:
            low, high = ranges[node.input[0]][methods[node.name]]
            found[node.input[0]] = max(abs(low), abs(high))
    return found


def int8_by_plan(prepared: Prepared, out: Path, plan: PrecisionPlan, ranges: Ranges) -> None:
    """Write the INT8 file that ``plan`` says, by ONNX Runtime's quantizers. The source is not touched.

    Raises:
        UserError: The plan does not fit the model.
        EdgeglmError: The file is no legal ONNX model.
    """
    require_fitting(plan, prepared.sha256, {node for group in prepared.groups for node in group.nodes})
    model = quantized_model(prepared, plan, ranges)
    quantize_tables(model, plan.embeddings)
    strip_traces(model)
    model.graph.ClearField("value_info")
    keep_used_opsets(model)
    sorted_nodes(model.graph)  # the quantizers append where they like, and ONNX asks for an order
    _require_legal(model, prepared)
    save_deterministic(model, out)


def _require_legal(model: onnx.ModelProto, prepared: Prepared) -> None:
    """Raise EdgeglmError for a file that breaks ONNX's rules, unless FP32's does so too.

    ONNX Runtime puts operators of its own among ONNX's, such as SimplifiedLayerNormalization.
    """
    reason = why_illegal(model)
    if reason and not why_illegal(prepared.model):
        raise EdgeglmError(
            f"the INT8 variant of {prepared.path.name} is no legal ONNX model ({reason}); "
            "choose another scheme, and report this model"
        )


def quantized_model(prepared: Prepared, plan: PrecisionPlan, ranges: Ranges) -> onnx.ModelProto:
    """Return the INT8 graph of a plan, in memory."""
    scheme, methods = scheme_named(plan.scheme), plan.int8_nodes
    model = prepared.model
    order = [node.name for node in model.graph.node if node.name in methods]
    try:
        if scheme.activation == "dynamic":
            return dynamic_model(model, order, reduced=scheme.reduced)
        nodes = with_glue(model, order) if scheme.chains else order
        return static_model(model, nodes, methods, ranges, scheme)
    except EdgeglmError:
        raise
    except Exception as error:  # the quantizers raise whatever their parts raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EdgeglmError(
            f"ONNX Runtime cannot quantize {prepared.path.name} by {plan.scheme}: {reason}; "
            "choose another scheme, or exclude the node it names"
        ) from error
