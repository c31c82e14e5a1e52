"""Small ONNX models whose calls take a chosen time, for the runner's benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, HIDDEN = 256, 1024
VOCABULARY = 1000


def dense_model(path: Path, depth: int, seed: int = 0) -> Path:
    """Write ``x`` float32 [B, 256] -> ``y`` float32 [B, 256] through ``depth`` pairs of matrix products."""
    rng = np.random.default_rng(seed)
    nodes, weights = _layers("x", "y", depth, rng)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])]
    return _saved(path, nodes, inputs, outputs, weights)


def picture_model(path: Path, side: int, channels: int, depth: int, output: str = "y", seed: int = 0) -> Path:
    """Write ``pixels`` float32 [B, 3, S, S] -> [B, channels]: a stem and ``depth`` 3x3 convolutions."""
    rng = np.random.default_rng(seed)
    nodes, weights, before = [], [], "pixels"
    for layer in range(depth + 1):
        filters = rng.normal(0, 0.05, (channels, 3 if layer == 0 else channels, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(filters, f"w{layer}"))
        stride = 4 if layer == 0 else 1
        nodes.append(
            helper.make_node("Conv", [before, f"w{layer}"], [f"c{layer}"], strides=[stride] * 2, pads=[1] * 4)
        )
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        before = f"r{layer}"
    nodes.append(helper.make_node("GlobalAveragePool", [before], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], [output]))
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, side, side])]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", channels])]
    return _saved(path, nodes, inputs, outputs, weights)


def text_model(path: Path, depth: int, seed: int = 0) -> Path:
    """Write ids and mask int64 [B, L] -> ``embedding`` [B, 256]: work in proportion to B x L."""
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 1, (VOCABULARY, WIDTH)).astype(np.float32)
    nodes, weights = _layers("words", "features", depth, rng)
    weights += [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([2], np.int64), "last"),
        numpy_helper.from_array(np.array([1], np.int64), "length"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        *nodes,
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["features", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "length"], ["summed"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "length"], ["count"], keepdims=1),
        helper.make_node("Div", ["summed", "count"], ["embedding"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length_"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH])]
    return _saved(path, nodes, inputs, outputs, weights)


def _layers(
    before: str, after: str, depth: int, rng: np.random.Generator
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    nodes, weights = [], []
    for layer in range(depth):
        up = rng.normal(0, WIDTH**-0.5, (WIDTH, HIDDEN)).astype(np.float32)
        down = rng.normal(0, HIDDEN**-0.5, (HIDDEN, WIDTH)).astype(np.float32)
        weights += [numpy_helper.from_array(up, f"up{layer}"), numpy_helper.from_array(down, f"down{layer}")]
        end = after if layer == depth - 1 else f"out{layer}"
        nodes += [
            helper.make_node("MatMul", [before, f"up{layer}"], [f"wide{layer}"]),
            helper.make_node("Relu", [f"wide{layer}"], [f"active{layer}"]),
            helper.make_node("MatMul", [f"active{layer}", f"down{layer}"], [end]),
        ]
        before = end
    return nodes, weights


def _saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto],
) -> Path:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
