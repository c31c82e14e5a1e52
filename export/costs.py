"""FLOPs and bytes of every node of an ONNX file, for the roofline and the preflight.

The graph is made concrete at batch 1 and at batch 2, its shapes are inferred, and the difference is
what an item costs. Weights are counted as an engine keeps them: a quantized one at its integer size,
a table that rows are gathered from by the rows. Shapes that depend on data (a mask built from a
range) are seen by running the graph once in ONNX Runtime; where that fails the nodes count as
nothing and are told as unknown, so that a floor stays one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, shape_inference

from edgeglm.core.errors import UserError
from edgeglm.targets.costs import GraphCosts, GraphTensor, NodeCost, costs_name, json_from_costs
from edgeglm.targets.schema import Precision

DEFAULT_LENGTH = 32

_MATRIX = {"MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "ConvInteger", "QLinearMatMul",
           "QLinearConv"}  # fmt: skip
_INTEGER = {"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
_FREE = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Constant"}
"""These move no data in an engine."""
_GATHERS = {"Gather", "GatherElements", "GatherND"}
_VIEWS = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
_NUMPY_CODES = (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13)
"""The numbers of ``TensorProto.DataType`` that numpy has a type for."""
_FLOAT8 = ("FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ")
_PRECISIONS: dict[str, Precision] = {"FLOAT16": "fp16", "BFLOAT16": "bf16"}


def costs_from_onnx(path: Path, *, length: int = DEFAULT_LENGTH) -> GraphCosts:
    """Work out what one call of an ONNX file costs.

    Args:
        path: The file.
        length: What a dynamic dimension other than the first of an input stands for, such as the
            tokens of a text.

    Raises:
        UserError: the file is absent or not ONNX.
    """
    model = _loaded(path)
    one, two = _Concrete(model, 1, length), _Concrete(model, 2, length)
    if absent := one.absent_shapes():
        seen = [_seen_shapes(path, concrete, absent) for concrete in (one, two)]
        if all(seen):  # one alone would make a difference of what is not there
            one.shapes.update(seen[0])
            two.shapes.update(seen[1])
    nodes = tuple(_node_cost(node, index, one, two) for index, node in enumerate(model.graph.node))
    live_one, live_two = one.peak_live(), two.peak_live()
    ends = [item.name for item in (*one.inputs, *model.graph.output)]
    # One by one: a weight that two nodes share is read once.
    weights = sum(one.kept_bytes(name) for name in one.weights_read())
    initializers = {item.name for item in model.graph.initializer}
    opsets = {item.domain or "ai.onnx": item.version for item in model.opset_import}
    operators = Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node
    )
    return GraphCosts(
        opset=opsets.get("ai.onnx", 0),
        file_bytes=_file_bytes(path, model),
        length=length,
        inputs=tuple(_tensor(item) for item in model.graph.input if item.name not in initializers),
        outputs=tuple(_tensor(item) for item in model.graph.output),
        ops=dict(sorted(operators.items())),
        quantized=bool({"QuantizeLinear", "DequantizeLinear"} & operators.keys()),
        weight_bytes=weights,
        io_bytes=sum(two.bytes_of(name) - one.bytes_of(name) for name in ends),
        live_bytes=live_two - live_one,
        live_bytes_fixed=max(0, 2 * live_one - live_two),
        unknown=sum(one.is_unknown(node) for node in model.graph.node),
        nodes=nodes,
    )


def costs_sources(
    models: Mapping[str, Mapping[str, Path]], *, length: int = DEFAULT_LENGTH
) -> dict[str, bytes]:
    """Return ``{path in the bundle: recorded costs}`` of ``{variant: {tower: ONNX file}}``, to be packed."""
    return {
        costs_name(variant, tower): json_from_costs(costs_from_onnx(path, length=length))
        for variant, towers in models.items()
        for tower, path in towers.items()
    }


@dataclass
class _Shape:
    dims: tuple[int, ...] | None
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.dims) if self.dims is not None else 0


@dataclass
class _Concrete:
    """The graph with its dynamic dimensions set, and what is constant in it."""

    model: Any
    batch: int
    length: int
    shapes: dict[str, _Shape] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    producers: dict[str, Any] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        graph = copy.graph
        self.constants = {item.name for item in graph.initializer}
        self.inputs = [item for item in graph.input if item.name not in self.constants]
        sizes: dict[str, int] = {}
        for item in self.inputs:
            for axis, dim in enumerate(item.type.tensor_type.shape.dim):
                if not dim.HasField("dim_value"):
                    size = self.batch if axis == 0 else self.length
                    sizes.setdefault(dim.dim_param, size)
                    dim.dim_value = sizes[dim.dim_param] if dim.dim_param else size
        del graph.value_info[:]
        for item in graph.output:  # what the exporter wrote would contradict the sizes
            for dim in item.type.tensor_type.shape.dim:
                if not dim.HasField("dim_value"):
                    dim.Clear()
        try:
            inferred = shape_inference.infer_shapes(copy, data_prop=True).graph
        except (shape_inference.InferenceError, RuntimeError, ValueError):
            inferred = graph
        for item in (*inferred.input, *inferred.value_info, *inferred.output):
            self.shapes[item.name] = _shape(item)
        for tensor in graph.initializer:
            self.shapes[tensor.name] = _Shape(tuple(tensor.dims), _dtype(tensor.data_type))
        for node in graph.node:
            known = [name for name in node.input if name]
            if all(name in self.constants for name in known) and node.op_type != "RandomNormal":
                self.constants.update(node.output)
            for name in node.output:
                self.producers[name] = node

    def shape(self, name: str) -> _Shape:
        return self.shapes.get(name, _Shape(None, "FLOAT"))

    def bytes_of(self, name: str) -> int:
        shape = self.shape(name)
        return (shape.elements * _bits(shape.dtype) + 7) // 8

    def kept_bytes(self, name: str) -> int:
        """Return how large an engine keeps a constant: a quantized one by its integers."""
        node = self.producers.get(name)
        if node is None:
            return self.bytes_of(name)
        if node.op_type == "DequantizeLinear" or node.op_type in _VIEWS:
            return self.kept_bytes(node.input[0])
        return self.bytes_of(name)

    def is_constant(self, node: Any) -> bool:
        return all(name in self.constants for name in node.output if name)

    def weights_read(self) -> set[str]:
        """Name the constants that are read whole by nodes that are not themselves constant."""
        return {
            name
            for node in self.model.graph.node
            if not self.is_constant(node)
            for index, name in enumerate(node.input)
            if name in self.constants and not (node.op_type in _GATHERS and index == 0)
        }

    def absent_shapes(self) -> list[str]:
        """Name the activations whose shapes inference did not find."""
        return [
            name
            for node in self.model.graph.node
            if not self.is_constant(node)
            for name in node.output
            if name and self.shape(name).dims is None
        ]

    def is_unknown(self, node: Any) -> bool:
        if self.is_constant(node):
            return False
        return any(name and self.shape(name).dims is None for name in node.output)

    def activations(self, node: Any) -> int:
        if self.is_constant(node) or node.op_type in _FREE:
            return 0
        written = sum(self.bytes_of(name) for name in node.output if name)
        if node.op_type in _GATHERS and node.input[0] in self.constants:
            return 2 * written  # the rows, not the table
        return written + sum(self.bytes_of(n) for n in node.input if n and n not in self.constants)

    def flops(self, node: Any) -> int:
        if self.is_constant(node) or node.op_type in _FREE:
            return 0
        out = self.shape(node.output[0]).elements
        if node.op_type not in _MATRIX:
            return out
        depth = self._depth(node)
        return 2 * out * depth if depth else 0

    def _depth(self, node: Any) -> int:
        """Return how many products are summed for one element of the output."""
        second = 3 if node.op_type.startswith("QLinear") else 1
        left, right = self.shape(node.input[0]).dims, self.shape(node.input[second]).dims
        if left is None or right is None:
            return 0
        if "Conv" in node.op_type:
            if node.op_type == "ConvTranspose":
                return int(math.prod(right) // max(1, right[1]))
            return int(math.prod(right[1:]))
        if node.op_type == "Gemm":
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            return left[0] if transposed else left[1]
        return left[-1] if left else 0

    def precision(self, node: Any) -> Precision:
        if node.op_type in _INTEGER:
            return "int8"
        sources = [self._source(name) for name in node.input[:2]]
        if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
            stored = self.shape(sources[0].input[0]).dtype
            return "fp8" if stored in _FLOAT8 else "int8"
        return _PRECISIONS.get(self.shape(node.output[0]).dtype, "fp32")

    def _source(self, name: str) -> Any:
        node = self.producers.get(name)
        while node is not None and node.op_type in _VIEWS:
            node = self.producers.get(node.input[0])
        return node

    def peak_live(self) -> int:
        """Return the most bytes of activations that live at once, in the graph's own order."""
        nodes = [node for node in self.model.graph.node if not self.is_constant(node)]
        last = {name: index for index, node in enumerate(nodes) for name in node.input if name}
        last.update((item.name, len(nodes)) for item in self.model.graph.output)
        live = {item.name: self.bytes_of(item.name) for item in self.inputs}
        peak = sum(live.values())
        for index, node in enumerate(nodes):
            live.update((name, self.bytes_of(name)) for name in node.output if name)
            peak = max(peak, sum(live.values()))
            for name in {*node.input, *node.output}:
                if last.get(name, index) <= index:
                    live.pop(name, None)
        return peak


def _seen_shapes(path: Path, concrete: _Concrete, names: Sequence[str]) -> dict[str, _Shape]:
    """Run the graph once on ones and return the shapes of the named tensors; none where it fails."""
    import onnxruntime

    model = onnx.load(str(path))
    ends = {item.name for item in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in ends)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feeds = {
        item.name: np.ones(
            [dim or 1 for dim in concrete.shape(item.name).dims or ()],
            helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type),
        )
        for item in concrete.inputs
    }
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found = session.run(list(names), feeds)
    except Exception:  # its exceptions share no base; the caller counts the nodes as unknown
        return {}
    types = {np.dtype(helper.tensor_dtype_to_np_dtype(code)): code for code in _NUMPY_CODES}
    return {
        name: _Shape(tuple(array.shape), _dtype(types[array.dtype]))
        for name, array in zip(names, found, strict=True)
        if isinstance(array, np.ndarray) and array.dtype in types
    }


def _node_cost(node: Any, index: int, one: _Concrete, two: _Concrete) -> NodeCost:
    matrix = node.op_type in _MATRIX and not one.is_constant(node)
    flops, bytes_ = two.flops(node) - one.flops(node), two.activations(node) - one.activations(node)
    read: Sequence[str] = [] if one.is_constant(node) else node.input
    weights = {
        name
        for position, name in enumerate(read)
        if name in one.constants and not (node.op_type in _GATHERS and position == 0)
    }
    return NodeCost(
        name=node.name or f"{node.op_type}_{index}",
        op=node.op_type,
        kind="matrix" if matrix else "other",
        precision=one.precision(node) if matrix else "fp32",
        flops=flops,
        flops_fixed=max(0, one.flops(node) - flops),
        weight_bytes=sum(one.kept_bytes(name) for name in weights),
        bytes=bytes_,
        bytes_fixed=max(0, one.activations(node) - bytes_),
    )


def _loaded(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no ONNX file at {path}; give the path of a model")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own class, which has no stable place
        raise UserError(f"{path} is not an ONNX file: {error}; export it again") from error
    if not model.graph.node:
        raise UserError(f"{path} holds no graph; export it again")
    return model


def _file_bytes(path: Path, model: Any) -> int:
    places: set[str] = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    beside = [path.parent / place for place in places]
    return sum(file.stat().st_size for file in (path, *beside) if file.is_file())


def _shape(item: Any) -> _Shape:
    tensor = item.type.tensor_type
    if not tensor.HasField("shape"):
        return _Shape(None, _dtype(tensor.elem_type))
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    whole = None if any(dim is None for dim in dims) else tuple(dim for dim in dims if dim is not None)
    return _Shape(whole, _dtype(tensor.elem_type))


def _tensor(item: Any) -> GraphTensor:
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        for dim in item.type.tensor_type.shape.dim
    )
    element = item.type.tensor_type.elem_type
    dtype = str(helper.tensor_dtype_to_np_dtype(element)) if element else "unknown"
    return GraphTensor(name=item.name, dtype=dtype, shape=dims)


def _dtype(element: int) -> str:
    return str(onnx.TensorProto.DataType.Name(element)) if element else "FLOAT"


def _bits(dtype: str) -> int:
    if dtype in ("INT4", "UINT4", "FLOAT4E2M1"):
        return 4
    if dtype in ("INT8", "UINT8", "BOOL", *_FLOAT8):
        return 8
    if dtype in ("FLOAT16", "BFLOAT16", "INT16", "UINT16"):
        return 16
    return 64 if dtype in ("INT64", "UINT64", "DOUBLE") else 32
