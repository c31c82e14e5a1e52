"""Bias correction, as a trial: the mean error of each quantized product goes into its bias.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), with means that
are measured on the calibration samples. All layers at once, or one after the other, each seeing those
before it corrected, which costs a conversion a layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgeglm.calibration.conversion import int8_by_plan
from edgeglm.calibration.feeds import Feeds
from edgeglm.calibration.ort_calls import Ranges, fp32_session, with_outputs
from edgeglm.calibration.plan import PrecisionPlan
from edgeglm.calibration.preparation import Prepared

_PLACE = {"Conv": 2, "Gemm": 2}


def bias_corrected(
    prepared: Prepared, plan: PrecisionPlan, ranges: Ranges, batches: Sequence[Feeds], *, one_by_one: bool
) -> Prepared:
    """Return the model with corrected biases. Products without a bias stay as they are."""
    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    places = _biases(model, set(plan.int8_nodes))
    wanted = _means(model, [tensor for tensor, _ in places], batches)
    for some in [[place] for place in places] if one_by_one else [places]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "int8.onnx"
            int8_by_plan(replace(prepared, model=model), out, plan, ranges)
            made = onnx.load(out)
        found = _means(made, [t for t, _ in some if _makes(made, t)], batches)
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        for tensor, bias in some:
            if tensor in found:
                error = wanted[tensor] - found[tensor]
                array = numpy_helper.to_array(weights[bias])
                weights[bias].CopyFrom(numpy_helper.from_array((array + error).astype(array.dtype), bias))
    return replace(prepared, model=model)


def _biases(model: onnx.ModelProto, nodes: set[str]) -> list[tuple[str, str]]:
    """Return (tensor, its bias) in graph order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.name not in nodes:
            continue
        if node.op_type in _PLACE and len(node.input) > 2 and node.input[2] in weights:
            found.append((node.output[0], node.input[2]))
        readers = [n for n in model.graph.node if node.output[0] in n.input]
        added = [n for n in readers if node.op_type == "MatMul" and n.op_type == "Add"]
        biases = [(n.output[0], name) for n in added for name in n.input if name in weights]
        if len(readers) == 1:
            found += biases
    return found


def _makes(model: onnx.ModelProto, tensor: str) -> bool:
    return any(tensor in node.output for node in model.graph.node)


def _means(model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Feeds]) -> dict[str, Any]:
    """Return the mean over samples of each tensor, float64, sequence lengths averaged out too."""
    if not tensors:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "means.onnx"
        with_outputs(model, list(tensors), path)
        session = fp32_session(str(path))
    sums: dict[str, Any] = {}
    for feeds in batches:
        for name, array in zip(tensors, session.run(list(tensors), dict(feeds)), strict=True):
            axes = (0, 2, 3) if array.ndim == 4 else tuple(range(array.ndim - 1))
            sums[name] = sums.get(name, 0.0) + array.mean(axis=axes, dtype=np.float64) / len(batches)
    return sums
