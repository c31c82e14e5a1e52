"""If these fail, a smaller table of embeddings is another table, or none that runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx
from onnx import numpy_helper

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.embeddings import quantize_tables
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.outcome import Settings
from edgeglm.calibration.plan import plan_from_toml
from edgeglm.calibration.precision import fidelity
from edgeglm.targets.schema import load_target
from tests.calibration.towers import batches_of, plan_of, text_tower

CPU = load_target("cpu")
pytestmark = pytest.mark.usefixtures("every_scheme_pays")


def test_int4_tables_leave_the_logging_of_others_as_it_is() -> None:
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        assert quantize_tables(text_tower(), "int4") == ["table"]
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(before)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_embedding_tables_shrink_and_keep_their_meaning(
    fp32_dir: Path, tmp_path: Path, precision: Any
) -> None:
    source, out = fp32_dir / "text.onnx", tmp_path / "out"
    settings = Settings(embeddings=precision, methods=("max",), gate=0.98)
    outcome = quantize_onnx(source, batches_of("text"), out, target=CPU, settings=settings)
    assert outcome.passed
    assert outcome.size_bytes < source.stat().st_size / 2
    plan = plan_from_toml((out / "plan.toml").read_text(), origin="plan.toml")
    assert plan.embeddings == precision


@pytest.mark.parametrize("scheme", ["dynamic", "u8s8", "s8s8"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_narrow_table_that_a_product_widens_is_quantized_beside_that_product(
    tmp_path: Path, scheme: str, precision: Any
) -> None:
    random = np.random.default_rng(0)
    weights = {"table": (300, 32), "wide.w": (32, 64)}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Gather", ["table", "ids"], ["embedding_0"], "table/Gather"),
            onnx.helper.make_node("MatMul", ["embedding_0", "wide.w"], ["embedding"], "wide/MatMul"),
        ],
        "main",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch"])],
        [onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(random.normal(size=n).astype(np.float32), k) for k, n in weights.items()],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    source = tmp_path / "text.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), source)
    batches = Batches({"ids": random.integers(0, 300, 64)}, 8)
    plan = plan_of(source, scheme, embeddings=precision)
    outcome = quantize_onnx(source, batches, tmp_path / "out", target=CPU, plan=plan)
    assert outcome.size_bytes < source.stat().st_size / 2
    assert fidelity(tmp_path / "out" / "model.onnx", source, batches).mean_cosine > 0.98


def test_tables_beside_fp8_are_made_as_the_plan_says(fp32_dir: Path, tmp_path: Path) -> None:
    settings = Settings(scheme="fp8", embeddings="int8", evaluations=4, gate=0.9)
    outcome = quantize_onnx(
        fp32_dir / "text.onnx",
        batches_of("text"),
        tmp_path / "out",
        target=load_target("l4"),
        settings=settings,
    )
    assert outcome.search.chosen is not None
    assert outcome.search.chosen.embeddings == "int8"
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    assert kinds["table_int8"] == onnx.TensorProto.INT8
    assert "table" not in kinds
