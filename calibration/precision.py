"""FP32 ONNX -> FP16 and INT8 variants of it, measured against it on held-out samples.

Precision is baked into the graph, for TensorRT 11 knows no FP16 or INT8 flags: FP16 by ModelOpt's
AutoCast, INT8 by Q/DQ nodes from ModelOpt. Inputs and outputs keep the types of the FP32 model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.calibration.feeds import batches_of, require_finite
from edgeglm.calibration.modelopt_calls import fp16_model, int8_model
from edgeglm.calibration.opsets import keep_used_opsets
from edgeglm.calibration.plan import PrecisionPlan
from edgeglm.calibration.policy import Int8Policy, nodes_of_policy
from edgeglm.calibration.qdq import set_activation_ranges, settle_quantizers
from edgeglm.calibration.residual_quantizers import quantize_residuals
from edgeglm.calibration.source import source_sha256
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.protocol import check_feeds
from edgeglm.evaluate.parity import Parity, parity
from edgeglm.export.anonymous import save_deterministic, strip_traces
from edgeglm.export.fp16_lint import Fp16Report, fp16_ready
from edgeglm.export.graph import all_nodes, inner_graphs, name_of
from edgeglm.export.plain import plain, plain_file, why_illegal
from edgeglm.export.rewrites import file_with_scales_before

if TYPE_CHECKING:
    import onnx

Feeds = Mapping[str, npt.NDArray[Any]]
HighPrecision = Literal["fp16", "fp32"]
LINTED = 2  # batches, beside quantizers: every tensor of them is looked at
_FLOAT_OPS = ("Conv", "Gemm", "MatMul")


class ConversionReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a conversion did. Everything but ``seconds`` repeats for the same bytes and samples.

    Attributes:
        sha256: Of the file written.
        source_sha256: Of the FP32 file.
        precision: "fp16", "int8" or "fp8".
        high_precision: What the rest of an INT8 graph computes in.
        policy: The INT8 policy, None for FP16 and where a plan says which nodes.
        plan: The precision plan that made the file, if one did.
        quantized_nodes: Names of the products that compute from INT8 inputs.
        residuals: Names of the residual sums whose other side is quantized too.
        fp32_nodes: Conv, Gemm and MatMul nodes that stay in FP32 in an FP16 file.
        lint: What would have overflowed in FP16, and what was done about it.
        weights, activations: How many tensors are quantized.
        samples, batches: How much calibration data was seen.
        size_bytes: Of the file.
        said: Warnings of ModelOpt.
        seconds: Wall time.
    """

    sha256: str
    source_sha256: str
    precision: Literal["fp16", "int8", "fp8"]
    high_precision: HighPrecision
    policy: Int8Policy | None = None
    plan: PrecisionPlan | None = None
    quantized_nodes: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ()
    fp32_nodes: tuple[str, ...] = ()
    lint: Fp16Report | None = None
    weights: int = 0
    activations: int = 0
    samples: int
    batches: int
    size_bytes: int
    said: tuple[str, ...] = ()
    seconds: float

    @property
    def left_in_fp32(self) -> tuple[str, ...]:
        """Nodes that a builder which may choose FP16 itself must not: what AutoCast and the lint kept."""
        linted = () if self.lint is None else self.lint.keep_fp32
        return tuple(dict.fromkeys((*self.fp32_nodes, *linted)))


def fp16_from_fp32(
    onnx_in: Path, onnx_out: Path, batches: Sequence[Feeds], *, keep_fp32: Sequence[str] = ()
) -> ConversionReport:
    """Write the FP16 variant of ``onnx_in``; inputs and outputs keep their types.

    Attention's scale goes before its first product, where TensorRT asks for it and which keeps that product
    small. Then :mod:`edgeglm.export.fp16_lint` looks for what overflows: LayerNorms that are written out
    become the operator, masks are clamped, and what must compute in FP32 is named to AutoCast, which runs the
    model on ``batches`` and keeps in FP32 each node whose values leave FP16's safe range besides. Memory
    grows with the batches (every tensor of every batch is held), so give it a few.

    Args:
        onnx_in: FP32 model; not changed.
        onnx_out: Where the variant goes.
        batches: Calibration feeds, one mapping a batch.
        keep_fp32: Names of nodes that stay in FP32 in any case.

    Raises:
        UserError: The feeds do not fit the model.
        EdgeglmError: The conversion failed. There is no fallback.
    """
    started = time.perf_counter()
    samples = checked_feeds(onnx_in, batches)
    with tempfile.TemporaryDirectory(prefix="edgeglm-fp16-") as folder:
        ready, lint = ready_for_fp16(onnx_in, Path(folder), batches)
        keep = tuple(dict.fromkeys((*keep_fp32, *lint.keep_fp32)))
        try:
            model, said = fp16_model(ready, batches, keep_fp32=keep)
        except Exception as error:  # AutoCast raises whatever its parts raise
            raise _failed(onnx_in, "FP16", error) from error
    fp32_nodes = _computing_in_fp32(model)
    _finish(model, onnx_in, onnx_out)
    return ConversionReport(
        sha256=sha256_file(onnx_out),
        source_sha256=source_sha256(onnx_in),
        precision="fp16",
        high_precision="fp16",
        fp32_nodes=tuple(fp32_nodes),
        lint=lint,
        samples=samples,
        batches=len(batches),
        size_bytes=onnx_out.stat().st_size,
        said=tuple(said),
        seconds=round(time.perf_counter() - started, 3),
    )


def int8_from_fp32(
    onnx_in: Path,
    onnx_out: Path,
    batches: Sequence[Feeds],
    *,
    policy: Int8Policy,
    high_precision: HighPrecision = "fp16",
    nodes: Sequence[str] | None = None,
    ranges: Mapping[str, float] | None = None,
    residuals: bool = False,
) -> ConversionReport:
    """Write the INT8 Q/DQ variant of ``onnx_in``; inputs and outputs keep their types.

    Symmetric, per-tensor activations, per-channel weights. With ``high_precision="fp16"`` the file is
    legal for strongly typed TensorRT on every SM (SM 75 refuses FP32 GEMM); with "fp32" it is the one
    that ONNX Runtime fuses into INT8 kernels on a CPU. With FP16, attention's scale goes before its product,
    and what would overflow is fused, clamped or kept in FP32 as in :func:`fp16_from_fp32`.

    Args:
        onnx_in: FP32 model; not changed (ModelOpt gets a scratch copy).
        onnx_out: Where the variant goes.
        batches: Calibration feeds, one mapping a batch.
        policy: Which nodes, and how their ranges are found.
        high_precision: What everything else computes in.
        nodes: Exactly these nodes, instead of what the policy finds.
        ranges: Activation -> largest value, for those whose range was found elsewhere.
        residuals: Whether residual sums read the Q/DQ pair that their other side has, so that TensorRT adds
            in the kernels of INT8 products; see :mod:`.residual_quantizers`.

    Raises:
        UserError: The feeds do not fit, the model is quantized already or has nothing to quantize.
        EdgeglmError: ModelOpt failed, or quantized other nodes than the policy says.
    """
    import onnx

    started = time.perf_counter()
    samples = checked_feeds(onnx_in, batches)
    wanted = list(nodes) if nodes is not None else nodes_of_policy(onnx.load(onnx_in), policy)
    by_modelopt = policy.placement == "modelopt"
    with tempfile.TemporaryDirectory(prefix="edgeglm-int8-") as folder:
        source, lint = onnx_in, None
        if high_precision == "fp16":  # for TensorRT; a CPU's runtime looks for the scale where it was
            source, lint = ready_for_fp16(onnx_in, Path(folder), batches[:LINTED])
        try:
            model, said = int8_model(
                source,
                batches,
                nodes=None if by_modelopt else wanted,
                method=policy.method,
                high_precision=high_precision,
                per_channel_matmul=policy.per_channel_matmul,
                keep_fp32=lint.keep_fp32 if lint is not None else (),
            )
        except Exception as error:  # ModelOpt raises whatever its parts raise
            raise _failed(onnx_in, "INT8", error) from error
    if ranges:
        set_activation_ranges(model, ranges)
    weights, activations = settle_quantizers(model, None if by_modelopt else wanted)
    quantized = _computing_from_int8(model)
    if not by_modelopt and not set(quantized) <= set(wanted):
        raise EdgeglmError(f"ModelOpt quantized {sorted(set(quantized) - set(wanted))} too; exclude them")
    if not weights:
        raise nothing_quantized(onnx_in.name)
    sums = quantize_residuals(model) if residuals else []
    _finish(model, onnx_in, onnx_out)
    return ConversionReport(
        sha256=sha256_file(onnx_out),
        source_sha256=source_sha256(onnx_in),
        precision="int8",
        high_precision=high_precision,
        policy=policy,
        quantized_nodes=tuple(quantized),
        residuals=tuple(sums),
        lint=lint,
        weights=weights,
        activations=activations,
        samples=samples,
        batches=len(batches),
        size_bytes=onnx_out.stat().st_size,
        said=tuple(said),
        seconds=round(time.perf_counter() - started, 3),
    )


def ready_for_fp16(onnx_in: Path, folder: Path, batches: Sequence[Feeds]) -> tuple[Path, Fp16Report]:
    """Return a file that can compute in FP16, in ``folder`` where anything had to change, and what was found.

    A CPU computes FP16 in FP32, so that no gate there would see what overflows.
    """
    scaled = file_with_scales_before(plain_file(onnx_in, folder / "plain.onnx"), folder / "scaled.onnx")
    found = fp16_ready(scaled, folder / "ready.onnx", batches)
    return Path(found.path), msgspec.structs.replace(found, path="")


def nothing_quantized(name: str) -> UserError:
    """Build the error for a model of which ModelOpt leaves every product as it was."""
    return UserError(
        f"ModelOpt leaves every product of {name} in high precision: so narrow ones, or of so few rows, "
        "gain nothing on Tensor Cores; take FP16, or give larger batches"
    )


def embeddings_of(onnx_path: Path, batches: Iterable[Feeds], *, threads: int = 1) -> npt.NDArray[np.float32]:
    """Return the first output over all batches, float32 [n, ...], from ONNX Runtime on the CPU."""
    with OnnxRuntimeEngine(onnx_path, threads=threads, spinning=False) as engine:
        first = engine.outputs[0].name
        rows = [np.asarray(engine.infer(feeds)[first], np.float32) for feeds in batches]
    return np.concatenate([np.atleast_1d(array) for array in rows])


def fidelity(variant: Path, reference: Path, batches: Sequence[Feeds], *, threads: int = 1) -> Parity:
    """Measure how far the outputs of ``variant`` are from those of ``reference`` on ``batches``."""
    return parity(
        embeddings_of(variant, batches, threads=threads), embeddings_of(reference, batches, threads=threads)
    )


def checked_feeds(onnx_path: Path, batches: Sequence[Feeds]) -> int:
    """Return the number of samples, each of which was run.

    Raises UserError for names, types, shapes, NaN or values that do not fit.
    """
    if not batches:
        raise UserError("the calibration set is empty; draw at least 16 samples")
    with OnnxRuntimeEngine(onnx_path, threads=1, spinning=False) as engine:
        for feeds in batches:
            check_feeds(engine.inputs, feeds, onnx_path.name)
            for name, array in feeds.items():
                require_finite(name, array)
            try:
                engine.infer(feeds)
            except EdgeglmError:
                raise
            except Exception as error:  # ONNX Runtime's exceptions share no base of their own
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"{onnx_path.name} cannot compute the samples: {reason}; give values that it takes, "
                    "such as token ids of its own tokenizer"
                ) from error
    return batches_of(batches)


def _finish(model: onnx.ModelProto, onnx_in: Path, onnx_out: Path) -> None:
    """Check and write. Shapes are inferred anew: ModelOpt leaves FP32 entries for FP16 values."""
    import onnx

    source = onnx.load(onnx_in, load_external_data=False)
    plain(source)
    strip_traces(model)
    model.graph.ClearField("value_info")
    for mine, theirs in ((model.graph.input, source.graph.input), (model.graph.output, source.graph.output)):
        if [(v.name, v.type.tensor_type.elem_type) for v in mine] != [
            (v.name, v.type.tensor_type.elem_type) for v in theirs
        ]:
            raise EdgeglmError(
                f"the variant of {onnx_in.name} takes or gives other tensors; report this model"
            )
        for value, original in zip(mine, theirs, strict=True):
            value.type.CopyFrom(original.type)
    keep_used_opsets(model)
    model.ir_version = source.ir_version
    restore_inner_types(model, source)
    require_legal(model, onnx_in.name)
    save_deterministic(model, onnx_out)


def require_legal(model: onnx.ModelProto, name: str) -> None:
    """Raise for a variant that breaks ONNX's rules, a UserError where a Loop or an If is why."""
    reason = why_illegal(model)
    if not reason:
        return
    if error := _inner_graph_error(model, name, f"whose types no longer fit ({reason})"):
        raise error
    raise EdgeglmError(f"the variant of {name} is no legal ONNX model ({reason}); report this model")


def restore_inner_types(model: onnx.ModelProto, source: onnx.ModelProto) -> None:
    """Give values of inner graphs, in place, the types that ModelOpt forgets; it converts none of them."""
    known = {value.name: value.type for value in _inner_values(source.graph)}
    for value in _inner_values(model.graph):
        if not value.type.tensor_type.elem_type and value.name in known:
            value.type.CopyFrom(known[value.name])


def _inner_values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    for node in all_nodes(graph):
        for inner in inner_graphs(node):
            yield from (*inner.input, *inner.output, *inner.value_info)


def _inner_graph_error(model: onnx.ModelProto, name: str, what: str) -> UserError | None:
    """Build the error for a model with a Loop or an If, whose graphs ModelOpt may not take."""
    bodies = [node for node in model.graph.node if any(inner_graphs(node))]
    if not bodies:
        return None
    return UserError(
        f"ModelOpt cannot convert {name}: {name_of(bodies[0])!r} ({bodies[0].op_type}) holds a graph of "
        f"its own, {what}; export the model without it, unrolled or traced"
    )


def _computing_from_int8(model: onnx.ModelProto) -> list[str]:
    dequantized = {
        out for node in model.graph.node if node.op_type == "DequantizeLinear" for out in node.output
    }
    return [
        node.name
        for node in model.graph.node
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") and dequantized & set(node.input)
    ]


def _computing_in_fp32(model: onnx.ModelProto) -> list[str]:
    from onnx import TensorProto

    floats = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    floats |= {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT for a in node.attribute)
    }
    kept = [n for n in model.graph.node if n.op_type in _FLOAT_OPS and floats & set(n.input)]
    return [node.name for node in kept]


def _failed(onnx_in: Path, precision: str, error: Exception) -> EdgeglmError:
    import onnx

    if isinstance(error, EdgeglmError):
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    model = onnx.load(onnx_in, load_external_data=False)
    return _inner_graph_error(model, onnx_in.name, f"at which it fails ({reason})") or EdgeglmError(
        f"ModelOpt cannot make the {precision} variant of {onnx_in.name}: {reason}; "
        "leave this precision out of the recipe, or exclude the node it names"
    )
