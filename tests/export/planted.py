"""Graphs that a plain cast to FP16 breaks, each in one known way, and FP16 arithmetic to show it.

Shared by the tests and by the bench.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edgeglm.export.emit import types_of
from tests.export.graphs import graph_model, normal

N = helper.make_node
WIDTH = 16
_AXIS = np.array([-1], np.int64)


class LayerNormalization(OpRun):
    """As specified: the moments in FP32, whatever the inputs are (``stash_type`` 1)."""

    def _run(
        self, x: Any, scale: Any, bias: Any = None, axis: int = -1, epsilon: float = 1e-5, **_: Any
    ) -> Any:
        wide = x.astype(np.float32)
        axes = tuple(range(axis, 0))
        centred = wide - wide.mean(axis=axes, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + epsilon)
        result = normed.astype(x.dtype) * scale
        return (result if bias is None else result + bias,)


def fp16_answers(model: onnx.ModelProto, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Run node by node in the graph's own types: FP16 is FP16 here, on every node."""
    with np.errstate(all="ignore"):
        evaluator = ReferenceEvaluator(model, new_ops=[LayerNormalization])
        outputs: Any = evaluator.run(None, {"x": x})
    return np.asarray(outputs[0], np.float32)


def cast_to_fp16(model: onnx.ModelProto, keep_fp32: Collection[str] = ()) -> onnx.ModelProto:
    """Cast every float of a graph, but the nodes of ``keep_fp32``, which cast on their border only."""
    types, made = types_of(model), onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    made.graph.ClearField("value_info")
    wide = {value.name for value in model.graph.input}
    casts: dict[tuple[str, bool], str] = {}
    constants = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}

    def as_type(name: str, want_wide: bool) -> str:
        if not name or types.get(name) != TensorProto.FLOAT or (name in wide) == want_wide:
            return name
        if (name, want_wide) not in casts:
            casts[name, want_wide] = f"{name}_{'fp32' if want_wide else 'fp16'}"
            to = TensorProto.FLOAT if want_wide else TensorProto.FLOAT16
            made.graph.node.append(N("Cast", [name], [casts[name, want_wide]], to=to))
        return casts[name, want_wide]

    for tensor in made.graph.initializer:
        if tensor.name in constants:
            readers = [node for node in model.graph.node if tensor.name in node.input]
            if any(node.name in keep_fp32 for node in readers):
                wide.add(tensor.name)
            else:
                with np.errstate(over="ignore"):
                    half = numpy_helper.to_array(tensor).astype(np.float16)
                tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for node in model.graph.node:
        stays = node.name in keep_fp32
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [as_type(name, stays) for name in node.input]
        if node.op_type == "Cast" and types.get(node.output[0]) == TensorProto.FLOAT:
            copy.input[:] = node.input
            del copy.attribute[:]
            copy.attribute.append(
                helper.make_attribute("to", TensorProto.FLOAT if stays else TensorProto.FLOAT16)
            )
        if stays:
            wide |= set(node.output)
        made.graph.node.append(copy)
    for value in made.graph.output:
        if value.name not in wide:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return made


def _layer_norm(x: str, y: str, prefix: str = "norm", *, multiplied: bool = False) -> list[onnx.NodeProto]:
    square = (
        N("Mul", [f"{prefix}c", f"{prefix}c"], [f"{prefix}q"], name=f"{prefix}/Square")
        if multiplied
        else N("Pow", [f"{prefix}c", "two"], [f"{prefix}q"], name=f"{prefix}/Square")
    )
    return [
        N("ReduceMean", [x, "axis"], [f"{prefix}m"], name=f"{prefix}/Mean"),
        N("Sub", [x, f"{prefix}m"], [f"{prefix}c"], name=f"{prefix}/Sub"),
        square,
        N("ReduceMean", [f"{prefix}q", "axis"], [f"{prefix}v"], name=f"{prefix}/Variance"),
        N("Add", [f"{prefix}v", "eps"], [f"{prefix}e"], name=f"{prefix}/Epsilon"),
        N("Sqrt", [f"{prefix}e"], [f"{prefix}s"], name=f"{prefix}/Root"),
        N("Div", [f"{prefix}c", f"{prefix}s"], [f"{prefix}d"], name=f"{prefix}/Div"),
        N("Mul", [f"{prefix}d", "scale"], [f"{prefix}g"], name=f"{prefix}/Scale"),
        N("Add", [f"{prefix}g", "bias"], [y], name=f"{prefix}/Bias"),
    ]


_NORM: dict[str, Any] = {
    "axis": _AXIS, "two": np.float32(2), "eps": np.float32(1e-5), "scale": normal(WIDTH, seed=4),
    "bias": normal(WIDTH, seed=5),
}  # fmt: skip
_OUTLIERS = np.where(np.arange(WIDTH) == 3, 900.0, 1.0).astype(np.float32)
_SHAPE = ("B", 4, WIDTH)


def planted() -> dict[str, tuple[onnx.ModelProto, str, str]]:
    """``{name: (graph, kind to be found, node to be named)}``; each takes x [B, 4, 16] of N(0, 1)."""
    mask_bias = np.where(np.arange(4) < 2, 0.0, 1.0).astype(np.float32)
    attention = [
        N("Transpose", ["x"], ["t"], name="key", perm=[0, 2, 1]),
        N("MatMul", ["x", "t"], ["l"], name="bmm1"),
    ]
    tail = [N("Softmax", ["a"], ["p"], name="softmax"), N("MatMul", ["p", "x"], ["y"], name="bmm2")]
    return {
        "layer norm, written out, an outlier channel": (
            graph_model(
                [N("Mul", ["x", "outliers"], ["o"], name="up"), *_layer_norm("o", "y")],
                {**_NORM, "outliers": _OUTLIERS}, shape=_SHAPE,
            ), "decomposed-layer-norm", "norm/Square",
        ),
        "layer norm, x * x": (
            graph_model(
                [N("Mul", ["x", "outliers"], ["o"], name="up"), *_layer_norm("o", "y", multiplied=True)],
                {**_NORM, "outliers": _OUTLIERS}, shape=_SHAPE,
            ), "decomposed-layer-norm", "norm/Square",
        ),
        "layer norm over the channels": (
            graph_model(
                [
                    N("Mul", ["x", "outliers"], ["o"], name="up"),
                    *(n for n in _layer_norm("o", "y")[:7]),
                    N("Mul", ["normd", "ones"], ["y"], name="norm/Scale"),
                ],
                {
                    **_NORM, "outliers": _OUTLIERS, "axis": np.array([1], np.int64),
                    "ones": np.ones((4, 1), np.float32),
                },
                shape=_SHAPE,
            ), "decomposed-layer-norm", "norm/Square",
        ),
        "RMS norm, written out": (
            graph_model(
                [
                    N("Mul", ["x", "outliers"], ["o"], name="up"),
                    N("Pow", ["o", "two"], ["q"], name="square"),
                    N("ReduceMean", ["q", "axis"], ["v"], name="mean"),
                    N("Add", ["v", "eps"], ["e"], name="epsilon"),
                    N("Sqrt", ["e"], ["s"], name="root"),
                    N("Div", ["o", "s"], ["d"], name="div"),
                    N("Mul", ["d", "scale"], ["y"], name="scale"),
                ],
                {**_NORM, "outliers": _OUTLIERS}, shape=_SHAPE,
            ), "decomposed-rms-norm", "square",
        ),
        "mask of (1 - m) * -1e9": (
            graph_model(
                [
                    *attention,
                    N("Mul", ["m", "huge"], ["b"], name="mask"),
                    N("Add", ["l", "b"], ["a"], name="add"),
                    *tail,
                ],
                {"m": mask_bias, "huge": np.float32(-1e9)}, shape=_SHAPE,
            ), "softmax-mask", "mask",
        ),
        "mask of the least float, in a Where": (
            graph_model(
                [
                    *attention,
                    N("Where", ["hide", "least", "none"], ["b"], name="mask"),
                    N("Add", ["l", "b"], ["c"], name="once"),
                    N("Sub", ["c", "b"], ["d"], name="again"),
                    N("Add", ["d", "b"], ["a"], name="add"),
                    *tail,
                ],
                {"hide": mask_bias > 0, "least": np.float32(-3.4e38), "none": np.float32(0)}, shape=_SHAPE,
            ), "softmax-mask", "mask",
        ),
        "residual stream with outliers": (
            graph_model(
                [
                    N("MatMul", ["x", "w"], ["h"], name="up"),
                    N("Add", ["h", "x"], ["r"], name="residual"),
                    N("MatMul", ["r", "w"], ["h2"], name="up2"),
                    N("Add", ["h2", "r"], ["r2"], name="residual2"),
                    N("LayerNormalization", ["r2", "scale", "bias"], ["y"], name="norm"),
                ],
                {"w": normal(WIDTH, WIDTH, scale=60.0), "scale": _NORM["scale"], "bias": _NORM["bias"]},
                shape=_SHAPE,
            ), "large-values", "residual2",
        ),
        "an exponential": (
            graph_model(
                [
                    N("Mul", ["x", "six"], ["s"], name="up"),
                    N("Exp", ["s"], ["e"], name="exp"),
                    N("ReduceSum", ["e", "axis"], ["t"], name="sum"),
                    N("Div", ["e", "t"], ["y"], name="div"),
                ],
                {"six": np.float32(8), "axis": _AXIS}, shape=_SHAPE,
            ), "large-values", "exp",
        ),
        "a constant factor": (
            graph_model(
                [
                    N("Mul", ["x", "far"], ["u"], name="up"),
                    N("Div", ["u", "far"], ["y"], name="down"),
                ],
                {"far": np.float32(1e6)}, shape=_SHAPE,
            ), "large-constant", "up",
        ),
        "the norm of long embeddings": (
            graph_model(
                [
                    N("Mul", ["x", "long"], ["u"], name="up"),
                    N("Mul", ["u", "u"], ["q"], name="square"),
                    N("ReduceSum", ["q", "axis"], ["t"], name="sum", keepdims=1),
                    N("Sqrt", ["t"], ["n"], name="root"),
                    N("Div", ["u", "n"], ["y"], name="div"),
                ],
                {"long": np.float32(200), "axis": _AXIS}, shape=_SHAPE,
            ), "large-values", "sum",
        ),
        "an epsilon that vanishes": (
            graph_model(
                [
                    N("Sub", ["x", "x"], ["o"], name="nothing"),
                    N("ReduceL2", ["o", "axis"], ["n"], name="norm", keepdims=1),
                    N("Clip", ["n", "tiny"], ["c"], name="clip"),
                    N("Div", ["o", "c"], ["z"], name="div"),
                    N("Add", ["z", "x"], ["y"], name="add"),
                ],
                {"tiny": np.float32(1e-12), "axis": _AXIS}, shape=_SHAPE,
            ), "vanishing-epsilon", "clip",
        ),
    }  # fmt: skip
