"""Residual sums that TensorRT adds in the kernel of the INT8 product before them.

It does so where the other side of the sum is quantized too (NVIDIA TensorRT documentation, "Q/DQ Placement").
Where an INT8 product reads that side as well, it has a Q/DQ pair, and the sum may read what that gives, which
costs no kernel and no range. Elsewhere, as in transformers that normalize first, a pair of its own would be
one kernel more, on the stream that has the outliers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def quantize_residuals(model: onnx.ModelProto) -> list[str]:
    """Let residual sums behind INT8 products read the Q/DQ pair of their other side, in place.

    Args:
        model: An INT8 graph whose quantizers are settled.

    Returns:
        The names of the sums that changed.
    """
    from edgeglm.export.emit import types_of
    from edgeglm.export.graph import Graph, sorted_nodes
    from edgeglm.export.residuals import dequantized, residual_adds

    graph, types = Graph(model), types_of(model)
    pairs = dequantized(graph)
    done = []
    for node, index in residual_adds(graph, pairs):
        name = node.input[index]
        if any(graph.quantizers_before(side) for side in node.input):
            continue
        kind = types.get(name)  # unknown behind an operator of one runtime
        same = [pair for pair in pairs.get(graph.source(name), ()) if kind and types.get(pair) == kind]
        if same:
            node.input[index] = same[0]
            done.append(node.name)
    sorted_nodes(model.graph)
    return done
