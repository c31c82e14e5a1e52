"""What of a graph can be INT8, in groups that only make sense together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeglm.core.errors import UserError

if TYPE_CHECKING:
    import onnx

WEIGHT_INPUT = {"Conv": 1, "Gemm": 1, "MatMul": 1}
#: What may stay INT8 between two INT8 nodes: it follows its inputs and has no weights.
_GLUE = ("Clip", "Relu", "Add", "MaxPool", "GlobalAveragePool", "AveragePool", "Concat", "Flatten")
_FLOATS = (1, 10, 11, 16)  # TensorProto.FLOAT, FLOAT16, DOUBLE, BFLOAT16


@dataclass(frozen=True, kw_only=True)
class Group:
    """Products with constant weights that read one tensor, such as query, key and value.

    Attributes:
        name: Of its first node.
        nodes: In graph order.
        weights: Elements of their weights: what orders a search where nothing is measured yet.
    """

    name: str
    nodes: tuple[str, ...]
    weights: int


def quantizable_groups(model: onnx.ModelProto, *, op_types: Collection[str] = WEIGHT_INPUT) -> list[Group]:
    """Return the groups of a graph, in graph order. Every node must have a name of its own.

    A MatMul's weight must be a matrix: of a stack of them no runtime takes one scale for each column.

    Raises UserError when the model is quantized already, or holds no product with constant weights.
    """
    from edgeglm.export.graph import unquantized

    unquantized(model)
    sizes = {
        tensor.name: size
        for tensor in model.graph.initializer
        if tensor.data_type in _FLOATS and (size := _elements(tensor))
    }
    flat = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    by_input: dict[str, list[tuple[str, int]]] = {}
    for node in model.graph.node:
        if node.op_type in op_types and node.op_type in WEIGHT_INPUT:
            weight = node.input[WEIGHT_INPUT[node.op_type]]
            if weight in sizes and (node.op_type != "MatMul" or weight in flat):
                by_input.setdefault(node.input[0], []).append((node.name, sizes[weight]))
    if not by_input:
        raise UserError(
            "the model has no Conv, Gemm or MatMul with constant weights (one matrix, in a MatMul), so "
            "nothing can be INT8; export it with its weights as initializers"
        )
    return [
        Group(name=members[0][0], nodes=tuple(n for n, _ in members), weights=sum(s for _, s in members))
        for members in by_input.values()
    ]


def joined_groups(groups: Sequence[Group], most: int) -> list[Group]:
    """Return at most ``most`` groups: neighbours are joined, so that a search stays within its bound."""
    size = -(-len(groups) // max(1, most))
    joined = []
    for start in range(0, len(groups), size):
        some = groups[start : start + size]
        name = some[0].name if len(some) == 1 else f"{some[0].name} .. {some[-1].name}"
        nodes = tuple(node for group in some for node in group.nodes)
        joined.append(Group(name=name, nodes=nodes, weights=sum(group.weights for group in some)))
    return joined


def with_glue(model: onnx.ModelProto, nodes: Collection[str]) -> list[str]:
    """Return ``nodes`` and what may stay INT8 between them, in graph order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    chosen = set(nodes)
    integer = set()  # tensors that INT8 nodes make
    for node in model.graph.node:  # a graph lists producers before consumers
        inputs = [name for name in node.input if name and name not in constants]
        if node.op_type in _GLUE and inputs and all(name in integer for name in inputs):
            chosen.add(node.name)
        if node.name in chosen:
            integer.update(node.output)
    return [node.name for node in model.graph.node if node.name in chosen]


def own_weights(model: onnx.ModelProto, nodes: Collection[str]) -> None:
    """Give ``nodes`` copies, in place, of weights that others read too, so that theirs may be changed."""
    from edgeglm.export.graph import Graph

    graph = Graph(model)
    copied = set()
    for node in graph.nodes:
        place = WEIGHT_INPUT.get(node.op_type)
        if node.name not in nodes or place is None:
            continue
        weight = graph.initializers[node.input[place]]
        if len(graph.readers[weight.name]) > 1 or weight.name in graph.outputs:
            copied.add(weight.name)
            own = model.graph.initializer.add()
            own.CopyFrom(weight)
            own.name = node.input[place] = f"{node.output[0]}_weight"
    left = Graph(model)
    for index in reversed(range(len(model.graph.initializer))):
        name = model.graph.initializer[index].name
        if name in copied and not left.readers[name] and name not in left.outputs:
            del model.graph.initializer[index]


def _elements(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count
