"""Any ONNX file in the form that tools agree on: no functions, no weights as inputs, shapes of outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeglm.core.errors import UserError
from edgeglm.export.anonymous import save_deterministic
from edgeglm.export.emit import inferred
from edgeglm.export.graph import all_nodes, model_from_file, name_of

if TYPE_CHECKING:
    import onnx

_STANDARD = ("", "ai.onnx")
_LEAST_IR = 4  # before it, every weight had to be listed as an input


def plain(model: onnx.ModelProto) -> bool:
    """Write functions out where they are called and take weights from the inputs, in place.

    A weight that is an input too is a default that a caller may replace, so that nobody may fold, fuse or
    quantize it. Outputs without a shape get the inferred one. Returns whether anything changed.
    """
    import onnx.inliner

    changed = bool(model.functions) or model.ir_version < _LEAST_IR
    if model.functions:
        own = {function.domain for function in model.functions}
        model.CopyFrom(onnx.inliner.inline_local_functions(model))
        kept = [entry for entry in model.opset_import if entry.domain not in own or not entry.domain]
        del model.opset_import[:]
        model.opset_import.extend(kept)
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) < len(model.graph.input):
        changed = True
        del model.graph.input[:]
        model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, _LEAST_IR)
    return _with_shapes(model) or changed


def _with_shapes(model: onnx.ModelProto) -> bool:
    """Give outputs that have no shape the inferred one, in place: ONNX's checker refuses none at all."""
    bare = [v for v in model.graph.output if not v.type.tensor_type.HasField("shape")]
    known = {value.name: value for value in inferred(model).graph.output} if bare else {}
    for value in bare:
        value.CopyFrom(known[value.name])
    return bool(bare)


def plain_file(path: Path, out: Path) -> Path:
    """Return ``path`` if it is plain, else ``out``, to which it was written so."""
    model = model_from_file(path)
    return save_deterministic(model, out) if plain(model) else path


def require_standard(model: onnx.ModelProto) -> None:
    """Raise UserError for an operator that ONNX does not have: TensorRT's parser knows none of them."""
    import onnx

    for node in all_nodes(model.graph):
        if node.domain not in _STANDARD or not onnx.defs.has(node.op_type):
            raise UserError(
                f"node {name_of(node)!r} is a {node.domain or 'onnxruntime'}.{node.op_type}, an operator of "
                "one runtime; give the file as it was before that runtime's optimizer rewrote it"
            )


def require_shapes(model: onnx.ModelProto, name: str) -> None:
    """Raise UserError for an input without a shape, which is not the same as one of no axes."""
    for value in model.graph.input:
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            raise UserError(
                f"the input {value.name!r} of {name} has no shape, not even a number of axes; export it with "
                "one, in which a name stands for each size that may vary"
            )


def require_no_float64(model: onnx.ModelProto, name: str) -> None:
    """Raise UserError for an input or output of a type that TensorRT does not have."""
    import onnx

    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
                raise UserError(
                    f"the {kind} {value.name!r} of {name} is float64, which TensorRT does not have; "
                    "export it as float32"
                )


def why_illegal(model: onnx.ModelProto) -> str:
    """Return what ``onnx.checker`` says against a model, in one line; "" for a legal one."""
    import onnx.checker

    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # onnx raises several classes of its own, and protobuf's
        return " ".join(str(error).split())[:200]
    return ""
