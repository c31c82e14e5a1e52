"""What a graph asks of a machine, as recorded on the host: a device reads it and needs no ``onnx``.

Every figure is affine in the batch: ``fixed + batch * per_item``. Texts have the recorded length.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edgeglm.core.errors import UserError
from edgeglm.targets.schema import Precision


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base: immutable, every key known."""


class GraphTensor(_Record, frozen=True, kw_only=True):
    """An input or output; a dimension is a size, a name, or None where the file says neither."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class NodeCost(_Record, frozen=True, kw_only=True):
    """One node.

    Attributes:
        kind: "matrix" for products, whose rate the profiles know; "other" for the rest.
        precision: Of a product: what its operands are in the graph.
        flops: Multiplications and additions an item of the batch.
        flops_fixed: Those that do not grow with the batch.
        weight_bytes: Constants that it reads, as an engine keeps them.
        bytes: Activations read and written an item.
        bytes_fixed: Those that do not grow with the batch.
    """

    name: str
    op: str
    kind: Literal["matrix", "other"] = "other"
    precision: Precision = "fp32"
    flops: int = 0
    flops_fixed: int = 0
    weight_bytes: int = 0
    bytes: int = 0
    bytes_fixed: int = 0


class GraphCosts(_Record, frozen=True, kw_only=True):
    """One ONNX file.

    Attributes:
        opset: Of the default domain.
        file_bytes: Size with its weights.
        length: The length of texts that the figures are for.
        ops: ``{operator: how often}``, domain in front where it is not ONNX's own.
        quantized: Whether there are Q/DQ nodes.
        weight_bytes: All constants that are read whole, each once.
        io_bytes: Graph inputs and outputs an item.
        live_bytes: The most activations that live at once, an item.
        live_bytes_fixed: Those that do not grow with the batch.
        unknown: Nodes whose shapes could not be worked out; they count as nothing.
    """

    schema: Literal[1] = 1
    opset: int
    file_bytes: int
    length: int
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    ops: dict[str, int]
    quantized: bool = False
    weight_bytes: int
    io_bytes: int
    live_bytes: int
    live_bytes_fixed: int = 0
    unknown: int = 0
    nodes: tuple[NodeCost, ...]

    def flops(self, batch: int) -> int:
        """Return the floating-point (or integer) operations of one call."""
        return sum(node.flops_fixed + batch * node.flops for node in self.nodes)

    def live(self, batch: int) -> int:
        """Return the bytes of activations that live at once."""
        return self.live_bytes_fixed + batch * self.live_bytes


def costs_from_json(data: bytes, origin: str) -> GraphCosts:
    """Read recorded costs. Raises UserError when they are broken."""
    try:
        return msgspec.json.decode(data, type=GraphCosts)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{origin} holds no recorded costs: {error}; record them on a host again") from error


def json_from_costs(costs: GraphCosts) -> bytes:
    """Return the JSON that ``costs_from_json`` reads."""
    return msgspec.json.encode(costs) + b"\n"


def costs_name(variant: str, tower: str) -> str:
    """Return where a bundle keeps the costs of one tower."""
    return f"costs/{variant}-{tower}.json"
