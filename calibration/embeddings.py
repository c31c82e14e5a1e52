"""Weight-only INT8 and INT4 for embedding tables: smaller files, activations untouched.

INT8 has one scale a row and standard operators only (Gather, Cast, Mul), so that every runtime reads it. INT4
has blocks of 32 and is ONNX Runtime's own operator, GatherBlockQuantized.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import TYPE_CHECKING

import numpy as np

from edgeglm.calibration.plan import Embeddings
from edgeglm.export.graph import Graph, attribute_of, opset_of

if TYPE_CHECKING:
    import onnx

_INT8_MAX = 127
_LEAST_ROWS = 256  # below, a table is no vocabulary and saves nothing
_BLOCK = 32
_INT4_IR = 10  # the first that knows tensors of four bits


def quantize_tables(model: onnx.ModelProto, precision: Embeddings) -> list[str]:
    """Quantize the tables that only Gather nodes read by rows, in place; return their names."""
    tables = tables_of(model)
    if precision == "high" or not tables:
        return []
    if precision == "int4":
        _to_int4(model, tables)
    else:
        for name in tables:
            _to_int8(model, name)
    return tables


def tables_of(model: onnx.ModelProto) -> list[str]:
    """Return the tables that only Gather nodes read by rows, of so many rows that they are vocabularies."""
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    large = {
        t.name
        for t in model.graph.initializer
        if t.data_type in floats and len(t.dims) == 2 and t.dims[0] >= _LEAST_ROWS
    }
    graph = Graph(model)
    return [
        name
        for name in graph.initializers
        if name in large
        and name not in graph.outputs
        and graph.readers[name]
        and all(_by_rows(node, name) for node in graph.readers[name])
    ]


def _by_rows(node: onnx.NodeProto, table: str) -> bool:
    """Say whether a node of the main graph takes rows of a table; what a body reads is no row."""
    place = list(node.input).index(table) if table in node.input else -1
    return node.op_type == "Gather" and place == 0 and attribute_of(node, "axis", 0) == 0


def _to_int8(model: onnx.ModelProto, name: str) -> None:
    from onnx import helper, numpy_helper

    graph = model.graph
    tensor = next(t for t in graph.initializer if t.name == name)
    table, kind = numpy_helper.to_array(tensor), tensor.data_type
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True).astype(np.float32), 1e-12) / _INT8_MAX
    rounded = np.clip(np.rint(table / scale), -_INT8_MAX, _INT8_MAX).astype(np.int8)
    tensor.CopyFrom(numpy_helper.from_array(rounded, f"{name}_int8"))
    graph.initializer.append(numpy_helper.from_array(scale.astype(table.dtype), f"{name}_scale"))
    nodes = []
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] != name:
            nodes.append(node)
            continue
        made, base = node.output[0], node.name or node.output[0]
        # Names of its own: what quantizes the product behind it names scales after the same output.
        rows, wide, scales = f"{made}_row_int8", f"{made}_row_wide", f"{made}_row_scale"
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", node.input[1]], [rows], f"{base}/Int8"),
            helper.make_node("Cast", [rows], [wide], f"{base}/Cast", to=kind),
            helper.make_node("Gather", [f"{name}_scale", node.input[1]], [scales], f"{base}/Scale"),
            helper.make_node("Mul", [wide, scales], [made], f"{base}/Mul"),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _to_int4(model: onnx.ModelProto, tables: list[str]) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(
        block_size=_BLOCK,
        is_symmetric=True,
        op_types_to_quantize=("Gather",),
        quant_axes=(("Gather", 1),),
    )
    opset = opset_of(model)
    others = [n.name for n in model.graph.node if n.op_type == "Gather" and n.input[0] not in tables]
    level, disabled = logging.getLogger().level, logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config)
            quantizer.process()
    finally:
        logging.disable(disabled)
        logging.getLogger().setLevel(level)
    made = quantizer.model.model
    for entry in made.opset_import:  # it writes 21, where other nodes mean something else or nothing
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    made.ir_version = max(made.ir_version, _INT4_IR)
    model.CopyFrom(made)
