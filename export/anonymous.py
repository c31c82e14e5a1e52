"""An ONNX model without traces of who built it, where, and in which order names were drawn.

``torch.export`` writes the stack trace of every node, with absolute paths, into ``metadata_props``.
Left there, the digest of a model would depend on the folder of the checkout, and the builder's
paths would travel to devices.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeglm.export.outputs import write_file

if TYPE_CHECKING:
    import onnx

PRODUCER = "edgeglm"
_SCOPES = "pkg.torch.onnx.name_scopes"


def strip_traces(model: onnx.ModelProto) -> None:
    """Clear metadata and doc strings everywhere in ``model``, and fix its producer, in place."""
    for message in _messages(model):
        for field in ("doc_string", "metadata_props"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
    model.producer_name = PRODUCER
    model.ClearField("producer_version")
    model.graph.name = "main"


def name_nodes_by_scope(model: onnx.ModelProto) -> None:
    """Name each node after the module that made it, in place: ``encoder.layers.0.query/MatMul``.

    Reports, exclusions and precision plans name nodes, so the names must tell a person something
    and must not change between two exports. Call it before :func:`strip_traces`.
    """
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        name = f"{_scope(node) or 'graph'}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def rename_values(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Rename values of the main graph in place; a value that has a new name already makes room."""
    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    complete = dict(names)
    for new in names.values():
        if new in taken and new not in names:
            complete[new] = next(f"{new}_{i}" for i in range(len(taken) + 1) if f"{new}_{i}" not in taken)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [complete.get(name, name) for name in field]
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = complete.get(value.name, value.name)


def save_deterministic(model: onnx.ModelProto, path: Path) -> Path:
    """Write ``model`` as one file whose bytes depend on its content only. Raises UserError if it cannot."""
    return write_file(path, model.SerializeToString(deterministic=True))


def _scope(node: onnx.NodeProto) -> str:
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes: list[str] = json.loads(entry.value.replace("'", '"'))
            # The last one is the operator's own name; before it come the modules, outermost first.
            return next((scope for scope in reversed(scopes[:-1]) if scope and scope[0] != "_"), "")
    return ""


def _messages(message: Any) -> Iterator[Any]:
    """Yield ``message`` and every message below it, without descending into tensors' raw data."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        items = value if field.is_repeated else [value]
        for item in items:
            yield from _messages(item)
