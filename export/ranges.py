"""The largest values that every tensor of a graph takes on real inputs, seen batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from edgeglm.core.errors import UserError
from edgeglm.export.emit import inferred
from edgeglm.export.graph import Graph

Feeds = Mapping[str, npt.NDArray[Any]]
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True, kw_only=True)
class Range:
    """The least and the greatest finite value that was seen, whether others were, and whether NaN was.

    ``elements`` is how many values a batch had at most.
    """

    low: float
    high: float
    elements: int = 0
    finite: bool = True
    nan: bool = False

    @property
    def largest(self) -> float:
        """The largest finite absolute value."""
        return max(abs(self.low), abs(self.high))


def measured_ranges(model: onnx.ModelProto, batches: Iterable[Feeds]) -> dict[str, Range]:
    """Run a model on batches and return ``{tensor: range}`` of every float tensor, inputs included.

    ONNX Runtime computes the graph as it stands, with no fusion, and one batch is held at a time.

    Raises UserError when there is no batch, the batches do not fit the model, or it cannot be run.
    """
    import onnxruntime

    names = _float_tensors(model)
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    ends = {value.name for value in opened.graph.output}
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in ends)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            opened.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base, nor with protobuf's
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"ONNX Runtime cannot run the model: {reason}; export it with operators that it has, below 2 GB"
        ) from error
    found: dict[str, Range] = {}
    wanted = [output.name for output in session.get_outputs() if output.name in names]
    taken = {value.name for value in session.get_inputs()}
    seen = False
    for feeds in batches:
        seen = True
        try:
            results = session.run(wanted, {name: feeds[name] for name in taken})
        except Exception as error:  # ONNX Runtime's exceptions share no base; KeyError names the input
            reason = " ".join(str(error).split())
            raise UserError(
                f"the samples do not fit the model: {reason}; give arrays named and shaped as its inputs"
            ) from error
        arrays = dict(zip(wanted, results, strict=True))
        arrays.update((name, feeds[name]) for name in taken if feeds[name].dtype.kind == "f")
        for name, array in arrays.items():
            if isinstance(array, np.ndarray) and array.size and array.dtype.kind == "f":
                found[name] = _wider(found.get(name), array)
    if not seen:
        raise UserError("there is no sample to measure ranges with; give one batch at least")
    return found


def _float_tensors(model: onnx.ModelProto) -> list[str]:
    """Return the computed tensors that shape inference does not know to be of another type."""
    known = inferred(model).graph
    others = {
        value.name
        for value in (*known.value_info, *known.output)
        if not value.type.HasField("tensor_type") or value.type.tensor_type.elem_type not in (0, *_FLOATS)
    }
    graph = Graph(model)
    return [
        name
        for node in graph.nodes
        if node.op_type != "Constant"
        for name in node.output
        if name and name not in others
    ]


def _wider(before: Range | None, array: npt.NDArray[Any]) -> Range:
    finite, nan = bool(np.isfinite(array).all()), bool(np.isnan(array).any())
    kept = array if finite else array[np.isfinite(array)]
    low, high = (float(kept.min()), float(kept.max())) if kept.size else (0.0, 0.0)
    if before is None:
        return Range(low=low, high=high, elements=array.size, finite=finite, nan=nan)
    return Range(
        low=min(low, before.low),
        high=max(high, before.high),
        elements=max(array.size, before.elements),
        finite=finite and before.finite,
        nan=nan or before.nan,
    )
