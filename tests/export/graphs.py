"""Small ONNX graphs for the tests of passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Feeds = Mapping[str, npt.NDArray[Any]]


def graph_model(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Any],
    *,
    shape: Sequence[int | str | None] = ("B", 4, 8),
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
    dtype: int = TensorProto.FLOAT,
    out_dtype: int | None = None,
    inputs: Mapping[str, tuple[int, Sequence[int | str | None]]] | None = None,
) -> onnx.ModelProto:
    """One input ``x`` unless others are given, outputs of any shape."""
    wanted = inputs or {"x": (dtype, shape)}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, kind, list(dims)) for name, (kind, dims) in wanted.items()],
        [helper.make_tensor_value_info(name, out_dtype or TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    ir = 8 if opset <= 16 else 10
    domains = {"", *(node.domain for node in nodes)}
    imports = [helper.make_opsetid(domain, 1 if domain else opset) for domain in sorted(domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir)
    model = onnx.shape_inference.infer_shapes(model)  # the outputs' shapes
    model.graph.ClearField("value_info")
    return model


def answers(model: onnx.ModelProto, feeds: Feeds) -> list[npt.NDArray[Any]]:
    """What ONNX Runtime answers on a CPU, with nothing fused."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(feeds)))


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> npt.NDArray[np.float32]:
    """Numbers that are the same each time."""
    return (np.random.default_rng(seed).normal(0, scale, shape)).astype(np.float32)
