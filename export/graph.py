"""An ONNX file opened with an index: who makes a tensor, who reads it, what is constant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgeglm.core.errors import UserError

#: What carries a value on unchanged, up to its precision.
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
#: What else only a quantized model holds; operators that begin with QLinear besides.
_INTEGER_OPS = (
    "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger16", "DynamicQuantizeLSTM", "QGemm",
    "QAttention", "QEmbedLayerNormalization", "MatMulNBits", "MatMulBnb4", "GatherBlockQuantized",
)  # fmt: skip
_SEE_THROUGH = (*QUANTIZERS, "Cast", "Identity")


def model_from_file(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external weights.

    Raises UserError when it is absent, no ONNX model, or weights beside it are missing or cut off.
    """
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise UserError(f"no ONNX file at {path}; give the path of a model")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path} is no ONNX model ({error}); export it again") from error
    if not model.graph.node or not model.opset_import:
        raise UserError(f"{path} is no ONNX model: it has no node; export it again")
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # onnx raises three classes of its own for a missing or short file
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} keeps weights in other files, and one cannot be read ({reason}); "
            "copy the files that were written beside it to the same folder"
        ) from error
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that the model was written for."""
    found = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not found:
        raise UserError("the model imports no standard operator set; export it again")
    return int(found[0])


def unquantized(model: onnx.ModelProto) -> None:
    """Raise UserError when some node quantizes, or computes with integers that stand for real numbers."""
    for node in all_nodes(model.graph):
        if node.op_type in (*QUANTIZERS, *_INTEGER_OPS) or node.op_type.startswith(("QLinear", "QOrdered")):
            raise UserError(
                f"the model is quantized already: node {node.name or node.output[0]!r} is a {node.op_type}; "
                "give the FP32 model that it was made from"
            )


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of every graph inside it."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from all_nodes(inner)


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def attribute_of(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of an attribute, or ``default``; strings come as ``str``."""
    for attribute in node.attribute:
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return default


class Graph:
    """The main graph of a model with indexes; make a new one after the graph was changed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.made_by: dict[str, onnx.NodeProto] = {}
        self.readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self.made_by.update((name, node) for name in node.output if name)
            for name in node.input:
                if name:
                    self.readers[name].append(node)
            for inner in inner_graphs(node):
                for name in _free_names(inner):
                    self.readers[name].append(node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = [v for v in model.graph.input if v.name not in self.initializers]
        self.outputs = {value.name for value in model.graph.output}
        self._arrays: dict[str, npt.NDArray[Any] | None] = {}

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        """Return the value of an initializer, a Constant, or one behind a Cast or a Q/DQ pair.

        A dequantized weight comes dequantized. None for what is computed from an input.
        """
        if name not in self._arrays:
            self._arrays[name] = self._constant(name)
        return self._arrays[name]

    def _constant(self, name: str) -> npt.NDArray[Any] | None:
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.made_by.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            return constant_value(node)
        if node.op_type == "DequantizeLinear":
            return self._dequantized(node)
        if node.op_type in ("Identity", "QuantizeLinear", "Cast"):
            value = self.constant(node.input[0])
            if value is None or node.op_type != "Cast":
                return value
            cast: npt.NDArray[Any] = value.astype(helper.tensor_dtype_to_np_dtype(attribute_of(node, "to")))
            return cast
        return None

    def _dequantized(self, node: onnx.NodeProto) -> npt.NDArray[Any] | None:
        maker = self.made_by.get(node.input[0])
        value, scale = self.constant(node.input[0]), self.constant(node.input[1])
        if value is None or scale is None:
            return None
        if maker is not None and maker.op_type == "QuantizeLinear":
            return value  # nearly: the rounding is of no interest to who asks for a pattern
        if scale.size > 1:
            axis = attribute_of(node, "axis", 1) % value.ndim
            scale = scale.reshape([-1 if i == axis else 1 for i in range(value.ndim)])
        dequantized: npt.NDArray[Any] = value.astype(scale.dtype) * scale
        return dequantized

    def scalar(self, name: str) -> float | None:
        """Return the value of a constant of one element, else None."""
        value = self.constant(name) if name else None
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def source(self, name: str) -> str:
        """Return where a tensor comes from, stepping back over Q/DQ, Cast and Identity."""
        while (node := self.made_by.get(name)) is not None and node.op_type in _SEE_THROUGH:
            name = node.input[0]
        return name

    def maker(self, name: str) -> onnx.NodeProto | None:
        """Return the node that computes a tensor, stepping back over Q/DQ, Cast and Identity."""
        return self.made_by.get(self.source(name))

    def quantizers_before(self, name: str) -> list[onnx.NodeProto]:
        """Return the Q/DQ nodes between a tensor and where it comes from, the nearest first."""
        found = []
        while (node := self.made_by.get(name)) is not None and node.op_type in _SEE_THROUGH:
            if node.op_type in QUANTIZERS:
                found.append(node)
            name = node.input[0]
        return found

    def is_quantized(self, name: str) -> bool:
        """Say whether a tensor comes from Q/DQ; what only arranges it anew is let through."""
        for _ in range(4):
            if self.quantizers_before(name):
                return True
            node = self.maker(name)
            if node is None or node.op_type not in ("Transpose", "Reshape", "Squeeze", "Unsqueeze"):
                return False
            name = node.input[0]
        return False

    def true_readers(self, name: str) -> list[onnx.NodeProto]:
        """Return who computes with a tensor, stepping on over Q/DQ, Cast and Identity."""
        found = []
        for node in self.readers.get(name, ()):
            if node.op_type in _SEE_THROUGH and node.input[0] == name:
                found += self.true_readers(node.output[0])
            else:
                found.append(node)
        return found

    def is_constant(self, name: str) -> bool:
        """Say whether a tensor has one value whatever the inputs are."""
        return self.constant(name) is not None


def constant_value(node: onnx.NodeProto) -> npt.NDArray[Any] | None:
    """Return the value of a Constant node; None for strings and sparse ones."""
    for attribute in node.attribute:
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
        if attribute.name in ("value_float", "value_floats"):
            return np.asarray(helper.get_attribute_value(attribute), np.float32)
        if attribute.name in ("value_int", "value_ints"):
            return np.asarray(helper.get_attribute_value(attribute), np.int64)
    return None


def name_of(node: onnx.NodeProto) -> str:
    """Return a node's name, or its type and first output when it has none."""
    return node.name or f"{node.op_type}({node.output[0] if node.output else ''})"


def named(model: onnx.ModelProto) -> None:
    """Give every node of the main graph a name that no other has, in place."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{index}"
        while name in taken:
            name = f"{name}_{index}"
        node.name = name
        taken.add(name)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove, in place, nodes whose outputs nobody reads and initializers nobody needs."""
    while True:
        used = {value.name for value in graph.output}
        for node in graph.node:
            used.update(node.input)
            for inner in inner_graphs(node):
                used.update(_free_names(inner))
        kept = [node for node in graph.node if any(name in used for name in node.output if name)]
        if len(kept) == len(graph.node):
            break
        replace_nodes(graph, kept)
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in used:
            del graph.initializer[index]


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make ``nodes`` the nodes of a graph, in place."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def sorted_nodes(graph: onnx.GraphProto) -> None:
    """Put the nodes, in place, into an order in which each comes after what it reads."""
    ready = {v.name for v in graph.input} | {t.name for t in graph.initializer} | {""}
    made = {name for node in graph.node for name in node.output}
    waiting, done = list(graph.node), []
    while waiting:
        later = []
        for node in waiting:
            needs = [*node.input, *(n for inner in inner_graphs(node) for n in _free_names(inner))]
            if all(name in ready or name not in made for name in needs):
                ready.update(node.output)
                done.append(node)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise UserError("the graph has a cycle; export it again")
        waiting = later
    replace_nodes(graph, done)


def rename_readers(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Let every reader of a tensor read another, in place; inner graphs too."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for inner in inner_graphs(node):
            rename_readers(inner, names)


def _free_names(graph: onnx.GraphProto) -> set[str]:
    """Return what a body reads from the graph around it."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {name for node in graph.node for name in node.output}
    read = {name for node in graph.node for name in node.input if name}
    read |= {value.name for value in graph.output}
    for node in graph.node:
        for inner in inner_graphs(node):
            read |= _free_names(inner)
    return read - own
