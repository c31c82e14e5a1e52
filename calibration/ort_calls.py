"""ONNX Runtime's quantizers, quiet, on copies. Its calibraters are called in :mod:`.ranges`."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeglm.calibration.groups import own_weights
from edgeglm.calibration.schemes import Method, Scheme
from edgeglm.core.errors import UserError
from edgeglm.export.graph import named
from edgeglm.export.plain import plain, require_shapes

if TYPE_CHECKING:
    import onnx

Range = tuple[float, float]
Ranges = Mapping[str, Mapping[Method, Range]]
_ERRORS_ONLY = 3


def fp32_session(model: bytes | str, *, threads: int = 1) -> Any:
    """Open an ONNX Runtime session on the CPU whose idle threads sleep."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def inferred_model(path: Path) -> onnx.ModelProto:
    """Read a model with the shapes and the mark that ONNX Runtime's quantizers look for.

    Nodes without a name get one, of their op and place. Raises UserError when it cannot be read.
    """
    import onnx
    import onnx.checker
    from google.protobuf.message import DecodeError
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    if not path.is_file():
        raise UserError(f"no ONNX file at {path}; give the path of a model")
    try:
        model = onnx.load(path)
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path} is no ONNX model ({error}); export it again") from error
    except (OSError, onnx.checker.ValidationError) as error:
        raise UserError(
            f"the weights of {path} are not there ({error}); put its external data beside it"
        ) from error
    if not model.graph.node:
        raise UserError(f"{path} has no node; export it again")
    require_shapes(model, path.name)
    plain(model)
    _one_opset_each(model)
    _forget_shapes_of_weights(model)
    named(model)
    model = _inferred(model, path)
    add_infer_metadata(model)
    return model


def folded_model(path: Path, out: Path) -> None:
    """Write ``path`` with constants folded and batch norms merged, by ONNX Runtime's basic optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    options.log_severity_level = _ERRORS_ONLY
    try:
        onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
        )
    except Exception as error:  # its exceptions share no base of their own
        raise UserError(
            f"ONNX Runtime cannot run {path.name}: {str(error).strip().splitlines()[0]}; "
            "export it with operators that it has"
        ) from error


def static_model(
    model: onnx.ModelProto,
    nodes: Sequence[str],
    methods: Mapping[str, Method],
    ranges: Ranges,
    scheme: Scheme,
) -> onnx.ModelProto:
    """Return a copy of ``model`` with Q/DQ around ``nodes``.

    Args:
        model: From :func:`inferred_model`.
        nodes: All that become INT8, glue included.
        methods: Node -> method for the ranges of what it reads; "max" where absent.
        ranges: Of every activation that these nodes read or make.
        scheme: Which integers.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kinds = sorted({node.op_type for node in model.graph.node if node.name in set(nodes)})
    wanted = _method_of_tensor(model, nodes, methods)
    symmetric = scheme.activation == "int8"
    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, by_method in ranges.items()
        for low, high in [by_method[wanted.get(name, "max")]]
    }
    with _quiet():
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, data),
            nodes_to_quantize=list(nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=kinds,
            extra_options={
                "ActivationSymmetric": symmetric,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": [] if scheme.chains else kinds,
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                **({"TensorQuantOverrides": _seven_bits(copy, nodes)} if scheme.reduced else {}),
            },
        )
        quantizer.quantize_model()
    made: onnx.ModelProto = quantizer.model.model
    return made


def dynamic_model(model: onnx.ModelProto, nodes: Sequence[str], *, reduced: bool) -> onnx.ModelProto:
    """Return a copy of ``model`` whose ``nodes`` find their ranges at run time, batch by batch."""
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    own_weights(copy, nodes)
    kinds = sorted({node.op_type for node in model.graph.node if node.name in set(nodes)})
    with _quiet():
        quantizer = ONNXQuantizer(
            copy,
            True,  # per channel
            reduced,
            QuantizationMode.IntegerOps,
            False,  # not static
            QuantType.QInt8,
            QuantType.QUInt8,
            None,
            list(nodes),
            [],
            kinds,
            {"MatMulConstBOnly": True},
        )
        quantizer.quantize_model()
    made: onnx.ModelProto = quantizer.model.model
    return made


def _method_of_tensor(
    model: onnx.ModelProto, nodes: Collection[str], methods: Mapping[str, Method]
) -> dict[str, Method]:
    """Return tensor -> method: that of the product which reads it, else which makes it."""
    chosen = set(nodes)
    read = {n.input[0]: methods[n.name] for n in model.graph.node if n.name in chosen and n.name in methods}
    made = {n.output[0]: methods[n.name] for n in model.graph.node if n.name in chosen and n.name in methods}
    return {**made, **read}


def _seven_bits(model: onnx.ModelProto, nodes: Collection[str]) -> dict[str, Any]:
    """Return overrides that give the weights of ``nodes`` 7 bits, and leave activations their 8."""
    from onnxruntime.quantization import QuantType

    from edgeglm.calibration.groups import WEIGHT_INPUT

    overrides: dict[str, Any] = {}
    for node in model.graph.node:
        if node.name not in nodes or node.op_type not in WEIGHT_INPUT:
            continue
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or transposed else 1
        kind = {"quant_type": QuantType.QInt8, "symmetric": True, "reduce_range": True, "axis": axis}
        overrides[node.input[1]] = [kind]
    return overrides


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str], path: Path) -> None:
    """Write a copy of ``model`` that gives these tensors besides its outputs."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {value.name: value for value in (*copy.graph.value_info, *copy.graph.output)}
    given = {value.name for value in copy.graph.output}
    for name in tensors:
        if name not in given:
            value = known.get(name)
            copy.graph.output.append(
                value if value is not None else onnx.helper.make_empty_tensor_value_info(name)
            )
    onnx.save(copy, path, save_as_external_data=copy.ByteSize() > 1 << 30)


def _forget_shapes_of_weights(model: onnx.ModelProto) -> None:
    """Let weights alone say their shapes: quantizers turn some, and what torch notes beside them stays."""
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def _one_opset_each(model: onnx.ModelProto) -> None:
    """Name ONNX's own domain once, as "": files say "ai.onnx" too, or both, which quantizers refuse."""
    versions: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        versions[domain] = max(entry.version, versions.get(domain, 0))
    del model.opset_import[:]
    for domain, version in sorted(versions.items()):
        model.opset_import.add(domain=domain, version=version)


def _inferred(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Infer shapes in memory; what cannot be inferred stays unknown and is not quantized."""
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise UserError(
            f"the shapes of {path.name} contradict each other ({error}); export it again"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizers' prints, warnings and advice off the terminal."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
