"""A transformer block as exporters write it, whole or quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from scripts.fixtures.graphs import graph_model, normal

N = helper.make_node
WIDTH, HEADS = 16, 2


def block(*, int8: bool = False, bmm_int8: tuple[str, ...] = ()) -> onnx.ModelProto:
    """One transformer block as exporters write it: heads from computed shapes, the scale behind Q K^T."""
    nodes = [
        N("Shape", ["x"], ["rows"], name="rows", end=2),
        N("Concat", ["rows", "rest", "head"], ["split"], name="split", axis=0),
        N("Concat", ["rows", "rest"], ["merge"], name="merge", axis=0),
        N("LayerNormalization", ["x", "scale", "bias"], ["n"], name="norm"),
    ]
    weights: dict[str, Any] = {
        "rest": np.array([-1], np.int64), "head": np.array([WIDTH // HEADS], np.int64),
        "scale": normal(WIDTH, seed=1), "bias": normal(WIDTH, seed=2), "factor": np.float32(0.25),
        "mask": np.where(np.arange(6) < 4, 0.0, -1e4).astype(np.float32).reshape(1, 1, 1, 6),
        "qs": np.float32(0.05), "qz": np.int8(0),
    }  # fmt: skip
    rows = "n"
    if int8:
        nodes += [
            N("QuantizeLinear", ["n", "qs", "qz"], ["nq"], name="n/Quantize"),
            N("DequantizeLinear", ["nq", "qs", "qz"], ["nd"], name="n/Dequantize"),
        ]
        rows = "nd"
    for index, role in enumerate(("query", "key", "value", "out")):
        weights |= {
            f"{role}.w": normal(WIDTH, WIDTH, seed=3 + index, scale=0.3),
            f"{role}.b": normal(WIDTH, seed=9),
        }
    for role, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        nodes += [
            N("MatMul", [rows, f"{role}.w"], [f"{role}m"], name=f"{role}/MatMul"),
            N("Add", [f"{role}m", f"{role}.b"], [f"{role}a"], name=f"{role}/Add"),
            N("Reshape", [f"{role}a", "split"], [f"{role}r"], name=f"{role}/Reshape"),
            N("Transpose", [f"{role}r"], [f"{role}t"], name=f"{role}/Transpose", perm=perm),
        ]
        if role in bmm_int8:
            nodes += [
                N("QuantizeLinear", [f"{role}t", "qs", "qz"], [f"{role}q"], name=f"{role}/Quantize"),
                N("DequantizeLinear", [f"{role}q", "qs", "qz"], [f"{role}d"], name=f"{role}/Dequantize"),
            ]
    side = {role: f"{role}d" if role in bmm_int8 else f"{role}t" for role in ("query", "key", "value")}
    nodes += [
        N("MatMul", [side["query"], side["key"]], ["l"], name="bmm1"),
        N("Mul", ["l", "factor"], ["ls"], name="attention/Scale"),
        N("Add", ["ls", "mask"], ["lm"], name="attention/Mask"),
        N("Softmax", ["lm"], ["p"], name="attention/Softmax", axis=-1),
        N("MatMul", ["p", side["value"]], ["o"], name="bmm2"),
        N("Transpose", ["o"], ["ot"], name="merge/Transpose", perm=[0, 2, 1, 3]),
        N("Reshape", ["ot", "merge"], ["om"], name="merge/Reshape"),
        N("MatMul", ["om", "out.w"], ["h"], name="out/MatMul"),
        N("Add", ["h", "out.b"], ["hb"], name="out/Add"),
        N("Add", ["hb", "x"], ["r"], name="residual/Add"),
        N("LayerNormalization", ["r", "scale", "bias"], ["r2"], name="norm2"),
        N("Gelu", ["r2"], ["y"], name="gelu"),
    ]
    return graph_model(nodes, weights, shape=("B", "S", WIDTH))
