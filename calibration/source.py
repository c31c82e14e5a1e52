"""A model's identity: its file and, where weights lie beside it, those files too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeglm.core.digest import sha256_file, sha256_json
from edgeglm.core.errors import UserError

if TYPE_CHECKING:
    import onnx


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return the files that hold external data of ``path``, by name. Raises UserError for no model."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import uses_external_data

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise UserError(f"{path} is no ONNX model ({error}); give the path of a model") from error
    names = {
        entry.value
        for tensor in _tensors(model.graph)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(path.parent / name for name in sorted(names))


def source_sha256(path: Path) -> str:
    """Return the digest of a model: its file's, or with external data of all files, each by name."""
    beside = weight_files(path)
    if not beside:
        return sha256_file(path)
    return sha256_json(
        {
            "model": sha256_file(path),
            "weights": {file.relative_to(path.parent).as_posix(): sha256_file(file) for file in beside},
        }
    )


def source_bytes(path: Path) -> int:
    """Return the size of a model with all files that belong to it."""
    return sum(file.stat().st_size for file in (path, *weight_files(path)))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
