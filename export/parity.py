"""An exported tower must give what its module gives. Asserted, not logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.evaluate.parity import cosine_rows

if TYPE_CHECKING:
    import torch


class ParityReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The distance between a module and its ONNX file, over every batch that was tried.

    Attributes:
        max_abs: The largest absolute difference of two elements.
        min_cosine: The cosine of the worst row.
        rows: How many rows were compared.
        shapes: The shape of the first input in each batch.
    """

    max_abs: float
    min_cosine: float
    rows: int
    shapes: tuple[tuple[int, ...], ...]


def assert_parity(
    module: torch.nn.Module,
    onnx_path: Path,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    *,
    atol: float = 1e-4,
    min_cosine: float = 0.99999,
    threads: int = 1,
) -> ParityReport:
    """Compare ``module`` in eval mode with the file's first output in ONNX Runtime on the CPU.

    Args:
        module: Its forward takes the inputs by name and gives one tensor [B, D].
        onnx_path: The exported file.
        inputs: Batches; give several sizes and lengths, or a dimension that was frozen stays unseen.
        atol: The largest absolute difference allowed.
        min_cosine: The least cosine of a row.
        threads: Of ONNX Runtime.

    Raises:
        UserError: Fewer than two different shapes were given.
        EdgeglmError: A batch differs by more, or holds NaN.
    """
    import torch

    shapes = tuple(tuple(next(iter(feeds.values())).shape) for feeds in inputs)
    if len(set(shapes)) < 2:
        raise UserError("parity needs batches of two shapes at least; add batches of 1, 3 and 8 samples")
    was_training = module.training
    module.eval()
    worst_abs, worst_cosine, rows = 0.0, 1.0, 0
    try:
        with OnnxRuntimeEngine(onnx_path, threads=threads) as engine, torch.no_grad():
            output = engine.outputs[0].name
            for feeds, shape in zip(inputs, shapes, strict=True):
                expected = module(**feeds).detach().cpu().numpy()
                actual = engine.infer({name: value.cpu().numpy() for name, value in feeds.items()})[output]
                if actual.shape != expected.shape:
                    raise EdgeglmError(
                        f"{onnx_path.name} gives shape {actual.shape} for inputs {shape}, and the module "
                        f"{expected.shape}; export it with those axes dynamic"
                    )
                difference = float(np.abs(actual.astype(np.float64) - expected).max())
                cosine = float(cosine_rows(actual, expected).min())
                if not (difference <= atol and cosine >= min_cosine):
                    raise EdgeglmError(
                        f"{onnx_path.name} differs from its module by {difference:.3g} (worst cosine "
                        f"{cosine:.6f}) at input shape {shape}, and {atol:g} ({min_cosine:g}) is allowed; "
                        "take data-dependent Python branches out of forward and export again"
                    )
                worst_abs, worst_cosine = max(worst_abs, difference), min(worst_cosine, cosine)
                rows += len(actual)
    finally:
        module.train(was_training)
    return ParityReport(max_abs=worst_abs, min_cosine=worst_cosine, rows=rows, shapes=shapes)
