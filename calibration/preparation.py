"""Any FP32 ONNX file made ready to be quantized, or refused with what to do about it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeglm.calibration.groups import WEIGHT_INPUT, Group, quantizable_groups
from edgeglm.calibration.ort_calls import folded_model, inferred_model
from edgeglm.calibration.source import source_sha256, weight_files
from edgeglm.core.errors import UserError
from edgeglm.export.anonymous import save_deterministic
from edgeglm.export.graph import opset_of
from edgeglm.export.lowering import raised

if TYPE_CHECKING:
    import onnx

_FOLDABLE = ("BatchNormalization", "Constant", "Identity")
_LEAST_OPSET = 13  # per-channel DequantizeLinear
_MOST_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Prepared:
    """An FP32 model made ready once: every plan is applied to copies of it.

    Attributes:
        path: The user's file; never written.
        sha256: Of it, and of the files that hold its weights.
        model: Named, with shapes; constants folded where the file needs that.
        groups: What can be INT8.
    """

    path: Path
    sha256: str
    model: onnx.ModelProto
    groups: tuple[Group, ...]

    @property
    def has_convolutions(self) -> bool:
        """Whether most of what can be INT8 are convolutions."""
        names = {node for group in self.groups for node in group.nodes}
        kinds = [node.op_type for node in self.model.graph.node if node.name in names]
        return kinds.count("Conv") * 2 > len(kinds)


def prepared_model(path: Path, *, op_types: Collection[str] = tuple(WEIGHT_INPUT)) -> Prepared:
    """Read any FP32 ONNX file for quantizing; only products of ``op_types`` may become INT8.

    Raises:
        UserError: It cannot be read or run, is quantized already, has nothing to quantize, has weights that
            are not FP32, is larger than 2 GB, or older than opset 13 and cannot be raised.
    """
    _require_size(path)
    model = inferred_model(path)
    with tempfile.TemporaryDirectory(prefix="edgeglm-prepared-") as folder:
        source = path
        if opset_of(model) < _LEAST_OPSET:
            model.graph.ClearField("value_info")
            source = save_deterministic(raised(model, _LEAST_OPSET), Path(folder) / "raised.onnx")
            model = inferred_model(source)
        if _wants_folding(model):
            if source == path and weight_files(path):  # the folded file would look for them beside itself
                model.graph.ClearField("value_info")
                source = save_deterministic(model, Path(folder) / "whole.onnx")
            folded_model(source, Path(folder) / "folded.onnx")
            model = inferred_model(Path(folder) / "folded.onnx")
    _take_factors_in(model)
    groups = tuple(quantizable_groups(model, op_types=op_types))
    _require_fp32(path, model, {node for group in groups for node in group.nodes})
    return Prepared(path=path, sha256=source_sha256(path), model=model, groups=groups)


def _require_size(path: Path) -> None:
    """Raise UserError for a model that protobuf cannot hold in one message, as every quantizer asks."""
    files = [file for file in (path, *weight_files(path)) if file.is_file()] if path.is_file() else []
    if (size := sum(file.stat().st_size for file in files)) > _MOST_BYTES:
        raise UserError(
            f"{path.name} and its weights take {size / 1e9:.1f} GB, and ONNX's quantizers hold 2 GB at most; "
            "export it in parts, each below that"
        )


def _require_fp32(path: Path, model: onnx.ModelProto, nodes: Collection[str]) -> None:
    """Raise UserError for a product whose weights INT8 cannot be made from."""
    from onnx import TensorProto, numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.name not in nodes:
            continue
        weight = tensors[node.input[WEIGHT_INPUT[node.op_type]]]
        if weight.data_type != TensorProto.FLOAT:
            raise UserError(
                f"the weights of {node.name!r} in {path.name} are "
                f"{TensorProto.DataType.Name(weight.data_type)}, and INT8 is made from FP32; "
                "give the FP32 model, or export it in float32"
            )
        if not np.isfinite(numpy_helper.to_array(weight)).all():
            raise UserError(
                f"the weights of {node.name!r} in {path.name} hold NaN or infinity; train or export it again"
            )


def _take_factors_in(model: onnx.ModelProto) -> None:
    """Multiply Gemm's weights by alpha and its biases by beta, in place, where both are constant.

    Quantizers set beta to 1 and leave the bias as it was; ONNX Runtime's INT8 kernel takes alpha for
    the bias too.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Gemm":
            continue
        for factor, place in (("alpha", 1), ("beta", 2)):
            found = next((a for a in node.attribute if a.name == factor and a.f != 1.0), None)
            if found is None or len(node.input) <= place or node.input[place] not in tensors:
                continue
            scaled = numpy_helper.to_array(tensors[node.input[place]]) * np.float32(found.f)
            node.input[place] = f"{node.output[0]}_{factor}"
            model.graph.initializer.append(numpy_helper.from_array(scaled, node.input[place]))
            found.f = 1.0


def _wants_folding(model: onnx.ModelProto) -> bool:
    constants = {tensor.name for tensor in model.graph.initializer}
    return any(
        node.op_type in _FOLDABLE
        or (node.op_type in ("Transpose", "Reshape", "Cast") and node.input[0] in constants)
        for node in model.graph.node
    )
