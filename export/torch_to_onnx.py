"""torch module -> ONNX file, through ``torch.export``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.export.anonymous import name_nodes_by_scope, rename_values, save_deterministic, strip_traces

if TYPE_CHECKING:
    import onnx
    import torch

#: Lane B of the targets: LayerNormalization (17), Gelu (20) and FP16 scales in Q/DQ (19) exist.
DEFAULT_OPSET = 20
#: protobuf's limit, and with it that of an ONNX file with its weights inside.
MAX_BYTES = 2 << 30
#: Outputs get their names after the export: torch 2.13 gives the result of ``nn.Embedding`` the name
#: "embedding" too, and writes a graph with two values of one name.
_OUTPUT = "output_to_rename_"


def onnx_from_module(
    module: torch.nn.Module,
    example_inputs: Mapping[str, torch.Tensor],
    path: Path,
    *,
    output_names: Sequence[str] = ("embedding",),
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    opset: int = DEFAULT_OPSET,
) -> Path:
    """Export ``module`` in eval mode to one self-contained ONNX file.

    The graph is folded by the exporter's own optimizer (onnxscript): it merges batch norms into
    convolutions, and it keeps the scopes that nodes are named after, so no second tool runs. The bytes
    depend on the module, the inputs' shapes and the library versions, and on no folder.

    Args:
        module: Its forward takes the inputs by these names.
        example_inputs: Name -> tensor, batch of 2 or more (1 would be taken for a constant).
        path: Where the file goes.
        output_names: Names of the outputs in order.
        dynamic_axes: Input -> {axis: name} of the axes that stay free, such as
            ``{"input_ids": {0: "batch", 1: "length"}}``.
        opset: ONNX opset; ``torch.export`` gives 18 at the least.

    Raises:
        UserError: The module cannot be exported, an axis does not stay free, or it is too large.
    """
    import onnx
    import torch

    axes = {name: dict((dynamic_axes or {}).get(name, {})) for name in example_inputs}
    was_training = module.training
    module.eval()
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (),
                kwargs=dict(example_inputs),
                dynamo=True,
                opset_version=opset,
                output_names=[f"{_OUTPUT}{index}" for index in range(len(output_names))],
                dynamic_shapes={name: free or None for name, free in axes.items()},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            f"cannot export {type(module).__name__} to ONNX: {reason}; "
            "rewrite that operation with ones that torch.export knows"
        ) from error
    finally:
        module.train(was_training)
    if program is None:
        raise EdgeglmError("torch.onnx.export gave no program; report it with the torch version")
    model = program.model_proto
    if model.ByteSize() >= MAX_BYTES:
        raise UserError(f"{path.name} would exceed 2 GB; choose a smaller model")
    rename_values(model, {f"{_OUTPUT}{index}": name for index, name in enumerate(output_names)})
    name_nodes_by_scope(model)
    strip_traces(model)
    model.graph.ClearField("value_info")  # the optimizer leaves some shapes behind that hold no longer
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    _check_interface(model, axes, output_names, opset)
    onnx.checker.check_model(model, full_check=True)
    return save_deterministic(model, path)


def _check_interface(
    model: onnx.ModelProto,
    axes: Mapping[str, Mapping[int, str]],
    output_names: Sequence[str],
    opset: int,
) -> None:
    inputs = {value.name: value for value in model.graph.input}
    if sorted(inputs) != sorted(axes):
        raise UserError(f"the graph takes {sorted(inputs)}, not {sorted(axes)}; use every input in forward")
    for name, free in axes.items():
        for axis in free:
            if not inputs[name].type.tensor_type.shape.dim[axis].dim_param:
                raise UserError(
                    f"axis {axis} ({free[axis]}) of {name} became a constant; "
                    "take out of forward what depends on its value"
                )
    if [value.name for value in model.graph.output] != list(output_names):
        raise UserError(
            f"the graph does not give {list(output_names)}; name as many outputs as forward returns"
        )
    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if found != {"ai.onnx": opset} or model.functions:
        raise UserError(f"the graph needs {found}, not opset {opset} alone; choose an opset of 18 or later")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself; warnings about the user's module pass."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    with warnings.catch_warnings():
        # torch 2.13 copies its own deprecated LeafSpec, and drops repeated names of one axis.
        warnings.filterwarnings(
            "ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning
        )
        warnings.filterwarnings(
            "ignore", message=r"# The axis name: \w+ will not be used", category=UserWarning
        )
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnxscript|onnx_ir)\.")
        logger.setLevel(logging.ERROR)  # it tells that torchvision is absent
        try:
            yield
        finally:
            logger.setLevel(level)
