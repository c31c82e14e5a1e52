"""Newer ONNX operators written with older ones: what each becomes below the opset that brought it.

Each function gets the node as an :class:`~edgeglm.export.emit.Emitter`, and emits nodes whose last one
writes the node's output. Definitions are those of the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from edgeglm.export.emit import Emitter
from edgeglm.export.graph import attribute_of

Equivalent = Callable[[Emitter], None]


def layer_normalization(emit: Emitter) -> None:
    """Nine nodes in the order that TensorRT and ONNX Runtime know again."""
    node = emit.origin
    x, scale = node.input[0], node.input[1]
    bias = node.input[2] if len(node.input) > 2 else ""
    outputs = [*node.output, "", ""]
    axes = _trailing_axes(emit, x, attribute_of(node, "axis", -1))
    mean = emit.reduced("ReduceMean", x, axes, out=outputs[1] or None, sensitive=True)
    centred = emit("Sub", [x, mean], sensitive=True)
    squared = emit("Pow", [centred, emit.constant(2.0)], sensitive=True)
    variance = emit.reduced("ReduceMean", squared, axes, sensitive=True)
    epsilon = emit.constant(attribute_of(node, "epsilon", 1e-5))
    deviation = emit("Sqrt", [emit("Add", [variance, epsilon], sensitive=True)], sensitive=True)
    if outputs[2]:
        emit("Reciprocal", [deviation], out=outputs[2])
    normed = emit("Div", [centred, deviation], sensitive=True)
    scaled = emit("Mul", [normed, scale], out=None if bias else node.output[0])
    if bias:
        emit("Add", [scaled, bias], out=node.output[0])


def rms_normalization(emit: Emitter) -> None:
    """Divide by the root of the mean square: x / sqrt(mean(x^2) + epsilon) * scale."""
    node = emit.origin
    x = node.input[0]
    axes = _trailing_axes(emit, x, attribute_of(node, "axis", -1))
    squared = emit("Pow", [x, emit.constant(2.0)], sensitive=True)
    mean = emit.reduced("ReduceMean", squared, axes, sensitive=True)
    epsilon = emit.constant(attribute_of(node, "epsilon", 1e-5))
    root = emit("Sqrt", [emit("Add", [mean, epsilon], sensitive=True)], sensitive=True)
    normed = emit("Div", [x, root], sensitive=True)
    emit("Mul", [normed, node.input[1]], out=node.output[0])


def gelu(emit: Emitter) -> None:
    """Through Erf; the approximate form through Tanh."""
    node = emit.origin
    x = node.input[0]
    half = emit.constant(0.5)
    if attribute_of(node, "approximate", "none") == "tanh":
        cubed = emit("Mul", [emit("Pow", [x, emit.constant(3.0)]), emit.constant(0.044715)])
        inner = emit("Mul", [emit("Add", [x, cubed]), emit.constant(math.sqrt(2 / math.pi))])
        curve = emit("Tanh", [inner])
    else:
        curve = emit("Erf", [emit("Div", [x, emit.constant(math.sqrt(2))])])
    product = emit("Mul", [x, emit("Add", [curve, emit.constant(1.0)])])
    emit("Mul", [product, half], out=node.output[0])


def swish(emit: Emitter) -> None:
    """Write x * sigmoid(alpha x)."""
    x, alpha = emit.origin.input[0], attribute_of(emit.origin, "alpha", 1.0)
    inner = x if alpha == 1.0 else emit("Mul", [x, emit.constant(alpha)])
    emit("Mul", [x, emit("Sigmoid", [inner])], out=emit.origin.output[0])


def mish(emit: Emitter) -> None:
    """Write x * tanh(softplus(x))."""
    x = emit.origin.input[0]
    emit("Mul", [x, emit("Tanh", [emit("Softplus", [x])])], out=emit.origin.output[0])


def group_normalization(emit: Emitter) -> None:
    """InstanceNormalization of the groups, then a scale and a bias for each channel."""
    node = emit.origin
    x, scale, bias = node.input
    groups = attribute_of(node, "num_groups")
    shape = emit.shapes.get(x)
    if shape is None or shape[1] is None:
        raise emit.refused("the channels of its input are unknown", "export with a fixed number of channels")
    channels, tail = shape[1], [1] * (len(shape) - 2)
    folded = emit("Reshape", [x, emit.constant([0, groups, -1], np.int64)])
    plain = [emit.constant(np.ones(groups)), emit.constant(np.zeros(groups))]
    attributes = {"epsilon": attribute_of(node, "epsilon", 1e-5)}
    normed = emit("InstanceNormalization", [folded, *plain], attributes, sensitive=True)
    unfolded = emit("Reshape", [normed, emit("Shape", [x])])
    wide = []
    for name in (scale, bias):
        value = emit.graph.constant(name)
        if value is None:
            raise emit.refused("its scale and bias are no constants", "fold them before")
        repeated = np.repeat(value, channels // value.size) if value.size != channels else value
        wide.append(emit.constant(repeated.reshape(1, channels, *tail)))
    emit("Add", [emit("Mul", [unfolded, wide[0]]), wide[1]], out=node.output[0])


def reduction(emit: Emitter) -> None:
    """Axes move from an input to an attribute."""
    node = emit.origin
    keepdims = attribute_of(node, "keepdims", 1)
    if len(node.input) < 2 or not node.input[1]:
        if attribute_of(node, "noop_with_empty_axes", 0):
            emit("Identity", [node.input[0]], out=node.output[0])
        else:
            emit(node.op_type, [node.input[0]], {"keepdims": keepdims}, out=node.output[0])
        return
    axes = emit.graph.constant(node.input[1])
    if axes is None:
        raise emit.refused("its axes are computed", "give them as a constant")
    if axes.size == 0 and attribute_of(node, "noop_with_empty_axes", 0):
        emit("Identity", [node.input[0]], out=node.output[0])
        return
    attributes = {"keepdims": keepdims, **({"axes": axes.tolist()} if axes.size else {})}
    emit(node.op_type, [node.input[0]], attributes, out=node.output[0])


def split(emit: Emitter) -> None:
    """Parts of unequal size become explicit."""
    node = emit.origin
    axis = attribute_of(node, "axis", 0)
    inputs = [name for name in node.input if name]
    if len(inputs) < 2:
        size = _dimension(emit, node.input[0], axis)
        count = len(node.output)
        if size is None:
            raise emit.refused("the dimension that it splits is unknown", "export with that dimension fixed")
        part = -(-size // count)
        sizes = [max(0, min(part, size - part * i)) for i in range(count)]
        inputs.append(emit.constant(sizes, np.int64))
    emit("Split", inputs, {"axis": axis}, out=node.output[0])
    emit.nodes[-1].output[:] = node.output


def pad(emit: Emitter) -> None:
    """Pads of some axes become pads of all."""
    node = emit.origin
    mode = attribute_of(node, "mode", "constant")
    if mode == "wrap":
        raise emit.refused("there is no mode 'wrap' before opset 19", "pad in another mode")
    inputs = list(node.input)
    if len(inputs) > 3 and inputs[3]:
        axes, pads = emit.graph.constant(inputs[3]), emit.graph.constant(inputs[1])
        if axes is None or pads is None:
            raise emit.refused("its pads or axes are computed", "give them as constants")
        rank = emit.rank(inputs[0])
        whole = np.zeros((2, rank), np.int64)
        whole[:, axes.reshape(-1) % rank] = pads.reshape(2, -1)
        inputs[1] = emit.constant(whole.reshape(-1), np.int64)
    emit("Pad", inputs[:3], {"mode": mode}, out=node.output[0])


def resize(emit: Emitter) -> None:
    """Only what opset 13 can say."""
    node = emit.origin
    dropped = {"antialias": 0, "keep_aspect_ratio_policy": "stretch"}
    for name, plain in dropped.items():
        if attribute_of(node, name, plain) != plain:
            raise emit.refused(f"there is no {name} before opset 18", "resize without it")
    if attribute_of(node, "coordinate_transformation_mode") == "half_pixel_symmetric":
        raise emit.refused("there is no half_pixel_symmetric before opset 19", "use half_pixel")
    axes = attribute_of(node, "axes")
    if axes is not None and [a % emit.rank(node.input[0]) for a in axes] != list(
        range(emit.rank(node.input[0]))
    ):
        raise emit.refused("there are no axes before opset 18", "give sizes or scales of all dimensions")
    kept = {a.name: attribute_of(node, a.name) for a in node.attribute if a.name not in (*dropped, "axes")}
    emit("Resize", node.input, kept, out=node.output[0])


def grid_sample(emit: Emitter) -> None:
    """The modes had other names, and there were images only."""
    node = emit.origin
    if len(emit.shapes.get(node.input[0], (0, 0, 0, 0))) != 4:
        raise emit.refused("volumes came with opset 20", "sample images")
    mode = attribute_of(node, "mode", "linear")
    kept = {a.name: attribute_of(node, a.name) for a in node.attribute}
    kept["mode"] = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    emit("GridSample", node.input, kept, out=node.output[0])


#: Operator -> (the opset that brought the form which needs rewriting, how).
EQUIVALENTS: dict[str, tuple[int, Equivalent]] = {
    "LayerNormalization": (17, layer_normalization),
    "RMSNormalization": (23, rms_normalization),
    "GroupNormalization": (18, group_normalization),
    "Gelu": (20, gelu),
    "Swish": (24, swish),
    "Mish": (18, mish),
    "Split": (18, split),
    "Pad": (18, pad),
    "Resize": (18, resize),
    "GridSample": (20, grid_sample),
    **{
        f"Reduce{kind}": (18, reduction)
        for kind in ("Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    },
}

#: Operators whose definition in the specification is itself a graph of older ones.
COMPOSED = (
    "Attention", "RotaryEmbedding", "AffineGrid", "CenterCropPad",
    "BlackmanWindow", "HannWindow", "HammingWindow",
)  # fmt: skip


def _trailing_axes(emit: Emitter, x: str, axis: int) -> Sequence[int]:
    return list(range(axis if axis < 0 else axis - emit.rank(x), 0))


def _dimension(emit: Emitter, name: str, axis: int) -> int | None:
    shape = emit.shapes.get(name)
    return None if shape is None else shape[axis]
