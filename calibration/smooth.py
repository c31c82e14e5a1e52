"""SmoothQuant: outliers of an activation's channels move into the weights that read them.

Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (2023):
channel j of the activation is divided by ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` and row j of the
weights multiplied by it, which changes nothing in FP32. The division goes into the LayerNormalization
before it where nothing else reads that, else it is a Mul. (ONNX Runtime's own option needs neural-compressor,
ModelOpt has it for torch only.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeglm.calibration.feeds import Feeds
from edgeglm.calibration.groups import own_weights
from edgeglm.calibration.ort_calls import fp32_session, with_outputs
from edgeglm.export.graph import Graph

if TYPE_CHECKING:
    import onnx

    from edgeglm.calibration.preparation import Prepared

_LEAST = 1e-5


def smoothed(prepared: Prepared, batches: Sequence[Feeds], alpha: float) -> Prepared:
    """Return the model with every MatMul group's activation smoothed. Its plans and names stay valid.

    Ranges must be found on the result. ``alpha`` 0.5 shares an outlier between both sides; 0 is refused by
    plans, whose 0 means none.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    own_weights(model, [name for group in prepared.groups for name in group.nodes])
    nodes = {node.name: node for node in model.graph.node}
    groups = [
        [nodes[name] for name in group.nodes]
        for group in prepared.groups
        if all(nodes[name].op_type == "MatMul" for name in group.nodes)
    ]
    tensors = [members[0].input[0] for members in groups]
    largest = _channel_maxima(prepared.model, tensors, batches)
    for members, tensor in zip(groups, tensors, strict=True):
        _smooth(model, members, tensor, largest[tensor], alpha)
    return replace(prepared, model=model)


def _smooth(
    model: onnx.ModelProto, members: Sequence[Any], tensor: str, largest: npt.NDArray[Any], alpha: float
) -> None:
    from onnx import helper, numpy_helper

    weights = {t.name: t for t in model.graph.initializer}
    arrays = {node.input[1]: numpy_helper.to_array(weights[node.input[1]]) for node in members}
    if any(array.ndim != 2 or len(array) != len(largest) for array in arrays.values()):
        return
    rows = np.max([np.abs(array).max(axis=1) for array in arrays.values()], axis=0)
    factor = np.maximum(largest, _LEAST) ** alpha / np.maximum(rows, _LEAST) ** (1 - alpha)
    factor = np.maximum(factor, _LEAST).astype(np.float32)
    for name, array in arrays.items():
        weights[name].CopyFrom(numpy_helper.from_array((array * factor[:, None]).astype(array.dtype), name))
    if _into_norm(model, members, tensor, factor):
        return
    divisor, made = f"{tensor}_smooth_factor", f"{tensor}_smoothed"
    model.graph.initializer.append(numpy_helper.from_array(1 / factor, divisor))
    place = (
        next(i for i, node in enumerate(model.graph.node) if tensor in node.output)
        if any(tensor in node.output for node in model.graph.node)
        else -1
    )
    model.graph.node.insert(
        place + 1, helper.make_node("Mul", [tensor, divisor], [made], name=f"{members[0].name}/Smooth")
    )
    known = next((v for v in model.graph.value_info if v.name == tensor), None)
    if known is not None:
        value = model.graph.value_info.add()
        value.CopyFrom(known)
        value.name = made
    for node in members:
        node.input[0] = made


def _into_norm(model: onnx.ModelProto, members: Sequence[Any], tensor: str, factor: npt.NDArray[Any]) -> bool:
    """Divide a LayerNormalization's scale and bias, if these nodes alone read it."""
    from onnx import numpy_helper

    graph = Graph(model)
    maker = graph.made_by.get(tensor)
    names = {node.name for node in members}
    if maker is None or maker.op_type != "LayerNormalization" or tensor in graph.outputs:
        return False
    if any(node.name not in names for node in graph.readers[tensor]):
        return False
    weights = graph.initializers
    parameters = [name for name in maker.input[1:3] if name]
    shared = any(len(graph.readers[name]) > 1 or name in graph.outputs for name in parameters)
    if shared or any(name not in weights for name in parameters):
        return False
    for name in parameters:
        array = numpy_helper.to_array(weights[name])
        weights[name].CopyFrom(numpy_helper.from_array((array / factor).astype(array.dtype), name))
    return True


def _channel_maxima(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Feeds]
) -> dict[str, npt.NDArray[Any]]:
    """Return the largest absolute value of each channel (the last axis) over all batches: float [C]."""
    found: dict[str, npt.NDArray[Any]] = {}
    inner = [name for name in dict.fromkeys(tensors) if name not in {v.name for v in model.graph.input}]
    with tempfile.TemporaryDirectory(prefix="edgeglm-smooth-") as folder:
        path = Path(folder) / "model.onnx"
        with_outputs(model, inner, path)
        session = fp32_session(str(path))
        for feeds in batches:
            made = session.run(inner, dict(feeds)) if inner else []  # none would mean every output
            values = dict(zip(inner, made, strict=True))
            values |= {name: feeds[name] for name in tensors if name in feeds}
            for name, array in values.items():
                channels = np.abs(array).max(axis=tuple(range(array.ndim - 1)), initial=0.0)
                found[name] = np.maximum(found.get(name, channels), channels)
    return found
