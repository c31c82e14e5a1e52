"""New nodes in the place of one: names that tell where they came from, constants beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgeglm.core.errors import UserError
from edgeglm.export.graph import Graph, name_of

_SHAPE_BYTES = 4096
"""Shapes and axes are smaller constants than this; what is larger is a weight."""


@dataclass(kw_only=True)
class Emitter:
    """Collects what replaces one node.

    Attributes:
        origin: The node that is replaced; the new ones are named after it.
        graph: The graph as it was.
        opset: What the new nodes are written for.
        ranks: ``{tensor: number of dimensions}``, as far as they are known.
        nodes, tensors: The new nodes in order, and their constants.
        sensitive: Names of new nodes that overflow in FP16: squares, their means, what divides by them.
    """

    origin: onnx.NodeProto
    graph: Graph
    opset: int
    shapes: Mapping[str, Sequence[int | None]]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    sensitive: list[str] = field(default_factory=list)

    def __call__(
        self,
        op: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
        *,
        out: str | None = None,
        sensitive: bool = False,
    ) -> str:
        """Add a node and return the name of its output, a new one unless ``out`` is given."""
        base = name_of(self.origin)
        name = f"{base}/{op}"
        taken = {node.name for node in self.nodes}
        if name in taken:
            name = next(f"{name}_{i}" for i in range(2, len(taken) + 3) if f"{name}_{i}" not in taken)
        output = out or f"{name}_output"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **(attributes or {})))
        if sensitive:
            self.sensitive.append(name)
        return output

    def constant(self, value: npt.ArrayLike, dtype: Any = np.float32) -> str:
        """Add a constant and return its name."""
        name = f"{name_of(self.origin)}/constant_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def reduced(
        self, op: str, x: str, axes: Sequence[int], *, keepdims: int = 1, out: str | None = None,
        sensitive: bool = False,
    ) -> str:  # fmt: skip
        """Add a reduction over fixed axes: an input from opset 18 on (ReduceSum: 13), an attribute before."""
        if op == "ReduceSum" or self.opset >= 18:
            inputs = [x, self.constant(list(axes), np.int64)]
            return self(op, inputs, {"keepdims": keepdims}, out=out, sensitive=sensitive)
        return self(op, [x], {"axes": list(axes), "keepdims": keepdims}, out=out, sensitive=sensitive)

    def rank(self, name: str) -> int:
        """Return the number of dimensions of a tensor. Raises UserError when it is unknown."""
        if name not in self.shapes:
            raise self.refused(f"the number of dimensions of {name!r} is unknown", "export with fixed ranks")
        return len(self.shapes[name])

    def refused(self, why: str, remedy: str) -> UserError:
        """Build the error for a node that has no equivalent."""
        return UserError(
            f"node {name_of(self.origin)!r} ({self.origin.op_type}) cannot be written for opset "
            f"{self.opset}: {why}; {remedy}"
        )


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Return ``{tensor: shape}`` by shape inference; None stands for a free dimension."""
    found: dict[str, tuple[int | None, ...]] = {}
    graph = inferred(model).graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            found[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim
            )
    found.update((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    return found


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Return ``{tensor: ONNX element type}`` by shape inference."""
    graph = inferred(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    found.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    return found


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with inferred shapes and types, its large weights left empty: they cost seconds."""
    bones = onnx.ModelProto()
    bones.ir_version = model.ir_version
    bones.opset_import.extend(model.opset_import)
    bones.functions.extend(model.functions)
    graph = bones.graph
    graph.name = model.graph.name or "main"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= _SHAPE_BYTES:
            graph.initializer.append(tensor)
        else:
            graph.initializer.append(
                onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            )
    return onnx.shape_inference.infer_shapes(bones)
