"""The operator sets that a quantized file declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeglm.export.graph import all_nodes

if TYPE_CHECKING:
    import onnx


def keep_used_opsets(model: onnx.ModelProto) -> None:
    """Drop, in place, the operator sets that no node uses, and put the others in the order of their names."""
    domains = {node.domain for node in all_nodes(model.graph)}
    kept = [entry for entry in model.opset_import if entry.domain in domains or not entry.domain]
    del model.opset_import[:]
    model.opset_import.extend(sorted(kept, key=lambda entry: entry.domain))
