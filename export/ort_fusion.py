"""A graph as ONNX Runtime runs it: its transformer optimizer, then its session's own passes."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Literal

import onnx

from edgeglm.core.errors import UserError
from edgeglm.export.graph import Graph

Family = Literal["bert", "vit"]


def optimized_by_transformers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what ``onnxruntime.transformers.optimizer`` makes of a model.

    The heads and the width are found by it in the graph. Its operators are ONNX Runtime's own.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with _quiet():
        from onnxruntime.transformers.fusion_options import FusionOptions
        from onnxruntime.transformers.optimizer import optimize_model

        family = family_of(model)
        with tempfile.TemporaryDirectory(prefix="edgeglm-fusion-") as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(copy, str(path))
            done = optimize_model(
                str(path),
                model_type=family,
                num_heads=0,
                hidden_size=0,
                optimization_options=FusionOptions(family),
                opt_level=0,
                only_onnxruntime=False,
            )
    made: onnx.ModelProto = done.model
    if not any(entry.domain == "com.microsoft" for entry in made.opset_import):
        made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return made


def fused_by_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime runs on a CPU after its optimizer and its session's passes.

    Raises UserError when it cannot load the model.
    """
    import onnxruntime

    with _quiet():  # where it fails, its temporary folder warns as it goes with the exception
        try:
            work = optimized_by_transformers(model)
        except Exception:  # the optimizer asserts what it expects; the session's own passes remain
            work = model
    with tempfile.TemporaryDirectory(prefix="edgeglm-fusion-") as folder, warnings.catch_warnings():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        if has_fp8(work):  # its passes move a Transpose between FP8 Q/DQ, where it has none
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        warnings.simplefilter("ignore")
        try:
            onnxruntime.InferenceSession(
                work.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no base
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"ONNX Runtime cannot load the model: {reason}; export it again") from error
        return onnx.load(options.optimized_model_filepath)


def family_of(model: onnx.ModelProto) -> Family:
    """Return what kind of transformer the optimizer should look for: by tokens or by pixels."""
    ranks = [len(value.type.tensor_type.shape.dim) for value in Graph(model).inputs]
    return "vit" if 4 in ranks else "bert"


def has_fp8(model: onnx.ModelProto) -> bool:
    """Say whether a weight or a zero point is FP8."""
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    return bool(kinds & {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2})


@contextmanager
def _quiet() -> Iterator[None]:
    """Its modules print, log and warn about what they do not find."""
    noise = io.StringIO()
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(noise), redirect_stderr(noise):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
