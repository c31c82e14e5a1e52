"""The layers of a built engine, from TensorRT's engine inspector or ``trtexec --exportLayerInfo``."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeglm.core.errors import UserError

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """One layer: its name, its kind, the types it writes, and the ONNX nodes it was made from."""

    name: str
    kind: str = ""
    precision: str = ""
    nodes: tuple[str, ...] = ()


def layers_from_file(path: Path) -> tuple[EngineLayer, ...]:
    """Read the layer table of an engine, in either of the two forms.

    Names of ONNX nodes are there only if the engine was built with detailed profiling verbosity.
    Raises UserError when the file is no such table.
    """
    try:
        return layers_from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the layers in {path}: {error}; write them with trtexec --exportLayerInfo"
        ) from error


def layers_from_json(table: Any) -> tuple[EngineLayer, ...]:
    """Parse the layer table. Raises ValueError when it is something else."""
    rows = table.get("Layers") if isinstance(table, dict) else table
    if not isinstance(rows, list):
        raise ValueError("it lists no layers")
    return tuple(_layer(row) for row in rows)


def layers_of_nodes(layers: Sequence[EngineLayer]) -> dict[str, list[str]]:
    """Return ``{ONNX node: names of the layers that hold it}``."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for layer in layers:
        for node in layer.nodes:
            found[node].append(layer.name)
    return dict(found)


def _layer(row: Any) -> EngineLayer:
    if isinstance(row, str):  # the inspector without detailed verbosity gives bare names
        return EngineLayer(name=row, nodes=_names_in(row))
    if not isinstance(row, dict) or not isinstance(row.get("Name"), str):
        raise ValueError("a layer has no name")
    metadata = str(row.get("Metadata") or "")
    outputs = row.get("Outputs")
    formats = (
        sorted({_type_of(output) for output in outputs if isinstance(output, dict)})
        if isinstance(outputs, list)
        else []
    )
    nodes = tuple(_ONNX_LAYER.findall(metadata)) or _names_in(row["Name"])
    return EngineLayer(
        name=row["Name"],
        kind=str(row.get("LayerType", "")),
        precision=", ".join(filter(None, formats)),
        nodes=nodes,
    )


def _type_of(output: dict[str, Any]) -> str:
    """Return the type and format of a tensor; TensorRT 11 writes in two fields what was one before."""
    whole = output.get("Format/Datatype")
    if whole is not None:
        return str(whole)
    return " ".join(str(output[key]) for key in ("DataType", "Datatype", "Format") if output.get(key))


def _names_in(name: str) -> tuple[str, ...]:
    """Return the nodes that TensorRT 8 joined into a layer's name with plus signs."""
    return tuple(part.strip() for part in name.split(" + "))
