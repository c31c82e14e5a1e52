"""What any ONNX file holds, for ``edgeglm inspect model.onnx``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError

if TYPE_CHECKING:
    import onnx


class OnnxTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input or output; a dynamic dimension is its name, or "?" without one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class OnnxDescription(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an ONNX file holds.

    Attributes:
        sha256: Of the file; weights in external files are not in it.
        size_bytes: Of the file.
        producer: Who wrote it.
        ir_version: Of the format.
        opsets: Domain -> version; the standard domain is "ai.onnx".
        inputs, outputs: Without the weights.
        parameters: Elements of all weights of two or more elements.
        parameters_by_dtype: The same by dtype, embedding tables and INT8 weights included.
        operators: Op type -> how many nodes, subgraphs included, the most frequent first.
        precision: "int8" if it holds Q/DQ nodes, "fp16" if most weights are, else "fp32".
        external_data: Whether weights lie in other files.
    """

    sha256: str
    size_bytes: int
    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[OnnxTensor, ...]
    outputs: tuple[OnnxTensor, ...]
    parameters: int
    parameters_by_dtype: dict[str, int]
    operators: dict[str, int]
    precision: str
    external_data: bool


def describe_onnx(path: Path) -> OnnxDescription:
    """Read an ONNX file without running it, nor loading weights from other files.

    Raises UserError when it is absent or no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise UserError(f"no ONNX file at {path}; give the path of a model")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path} is no ONNX model ({error}); export it again") from error
    if not model.graph.node or not model.opset_import:
        raise UserError(f"{path} is no ONNX model: it has no node; export it again")
    weights = {tensor.name for tensor in model.graph.initializer}
    by_dtype: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        if (size := int(np.prod(tensor.dims, dtype=np.int64))) > 1:
            by_dtype[_dtype_name(tensor.data_type)] += size
    operators = Counter(node.op_type for node in _nodes(model.graph.node))
    return OnnxDescription(
        sha256=sha256_file(path),
        size_bytes=path.stat().st_size,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        inputs=tuple(_tensor(value) for value in model.graph.input if value.name not in weights),
        outputs=tuple(_tensor(value) for value in model.graph.output),
        parameters=sum(by_dtype.values()),
        parameters_by_dtype=dict(by_dtype.most_common()),
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        precision=_precision(by_dtype, operators),
        external_data=any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer),
    )


def _tensor(value: onnx.ValueInfoProto) -> OnnxTensor:
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim
    )
    return OnnxTensor(name=value.name, dtype=_dtype_name(tensor.elem_type), shape=shape)


def _dtype_name(data_type: int) -> str:
    import onnx

    name: str = onnx.TensorProto.DataType.Name(data_type).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _precision(by_dtype: Counter[str], operators: Counter[str]) -> str:
    if "QuantizeLinear" in operators or "DequantizeLinear" in operators:
        return "int8"
    return "fp16" if by_dtype["float16"] > by_dtype["float32"] else "fp32"
