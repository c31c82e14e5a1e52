"""What a file for TensorRT has besides Q/DQ: attention's scale where it is asked for, residuals in INT8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx

from edgeglm.calibration import feeds as stored
from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.outcome import Settings
from edgeglm.calibration.policy import policy_named
from edgeglm.calibration.precision import HighPrecision, fidelity, fp16_from_fp32, int8_from_fp32
from edgeglm.calibration.residual_quantizers import quantize_residuals
from edgeglm.evaluate.parity import cosine_rows
from edgeglm.export.emit import types_of
from edgeglm.export.fusion import fusions_of_file, rewritten_file
from edgeglm.export.lowering import lane_a_from_onnx
from edgeglm.targets.schema import load_target
from scripts.fixtures import planted as planting
from scripts.fixtures.graphs import answers, graph_model, normal
from scripts.fixtures.planted import fp16_answers, planted
from tests.calibration.towers import Feeds
from tests.export.blocks import WIDTH, block

POLICY = policy_named("linear-and-conv")


def attention_block(folder: Path) -> tuple[Path, Feeds]:
    """A transformer block whose scale stands behind the first product, and four batches for it."""
    path = folder / "block.onnx"
    onnx.save(block(), path)
    values = np.random.default_rng(0).normal(size=(4, 2, 6, WIDTH)).astype(np.float32)
    return path, [{"x": batch} for batch in values]


def scales(path: Path) -> list[str]:
    rows = fusions_of_file(path).missed("tensorrt")
    return [row.blocker for row in rows if "scale stands behind" in row.why]


def test_the_scale_goes_before_the_product_in_fp16_and_int8_for_tensorrt(tmp_path: Path):
    source, feeds = attention_block(tmp_path)
    before = source.read_bytes()
    assert scales(source)
    fp16_from_fp32(source, tmp_path / "fp16.onnx", feeds)
    int8_from_fp32(source, tmp_path / "int8.onnx", feeds, policy=POLICY)
    for name, least in (("fp16", 0.99999), ("int8", 0.998)):
        assert scales(tmp_path / f"{name}.onnx") == [], name
        assert fidelity(tmp_path / f"{name}.onnx", source, feeds).min_cosine > least, name
    assert source.read_bytes() == before


def test_an_fp16_file_that_masks_in_fp32_is_rewritten_into_one_that_onnxruntime_loads(tmp_path: Path):
    source, feeds = attention_block(tmp_path)
    fp16_from_fp32(source, tmp_path / "fp16.onnx", feeds)
    done = rewritten_file(tmp_path / "fp16.onnx", tmp_path / "fused.onnx", "onnxruntime")
    assert "several precisions" in done.kept["attention/Softmax"]
    assert fidelity(tmp_path / "fused.onnx", source, feeds).min_cosine > 0.9999


def test_on_a_cpu_the_scale_stays_where_its_runtime_looks_for_it(tmp_path: Path):
    source, feeds = attention_block(tmp_path)
    int8_from_fp32(source, tmp_path / "int8.onnx", feeds, policy=POLICY, high_precision="fp32")
    assert scales(tmp_path / "int8.onnx") == scales(source)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_residual_reads_the_pair_of_the_product_beside_it_and_answers_alike(
    fp32_dir: Path, batches: dict[str, Feeds], tower: str, precision: HighPrecision, tmp_path: Path
):
    source, feeds = fp32_dir / f"{tower}.onnx", batches[tower]
    made = {}
    for residuals in (False, True):
        out = tmp_path / f"{residuals}.onnx"
        report = int8_from_fp32(
            source, out, feeds, policy=POLICY, high_precision=precision, residuals=residuals
        )
        assert report.residuals == (("residual/Add",) if residuals else ())
        assert fusions_of_file(out).counts("tensorrt")["quantized-residual"] == (int(residuals), 1)
        made[residuals] = sum(n.op_type == "QuantizeLinear" for n in onnx.load(out).graph.node)
    assert made[True] == made[False]
    assert fidelity(tmp_path / "True.onnx", source, feeds).min_cosine > 0.995


def test_a_residual_that_no_int8_product_reads_keeps_its_precision(tmp_path: Path):
    """A transformer that normalizes first: the stream with the outliers is read by the norm alone."""
    source, feeds = attention_block(tmp_path)
    report = int8_from_fp32(source, tmp_path / "int8.onnx", feeds, policy=POLICY, residuals=True)
    assert report.residuals == ()
    (row,) = (r for r in fusions_of_file(tmp_path / "int8.onnx").missed("tensorrt"))
    assert (row.at, row.pattern) == ("residual/Add", "quantized-residual")
    assert row.why.endswith("a Q/DQ pair of its own would be one kernel more")


def test_an_fp8_file_of_a_transformer_has_a_report(tmp_path: Path):
    """ONNX Runtime's passes make a graph of it that it cannot load itself."""
    source, feeds = attention_block(tmp_path)
    samples = stored.Batches({"x": np.concatenate([batch["x"] for batch in feeds])}, 2)
    l4, settings = load_target("l4"), Settings(scheme="fp8", evaluations=2, gate=0.9)
    assert quantize_onnx(source, samples, tmp_path / "out", target=l4, settings=settings).passed
    report = fusions_of_file(tmp_path / "out" / "model.onnx")
    assert report.counts("tensorrt")["attention"] == (1, 1)


@pytest.mark.parametrize("shortcut", [0, 1])
@pytest.mark.parametrize("known", [True, False])
def test_the_sum_of_two_products_reads_the_pair_that_one_has(shortcut: int, known: bool):
    """Whichever side it is; behind an operator that shape inference does not know there is none to trust."""
    make = onnx.helper.make_node
    nodes = [
        make("Relu" if known else "Strange", ["x"], ["t0"], domain="" if known else "strange"),
        make("QuantizeLinear", ["t0", "s", "z"], ["q0"]),
        make("DequantizeLinear", ["q0", "s", "z"], ["d0"]),
        make("MatMul", ["d0", "w"], ["t1"], name="before"),
        make("QuantizeLinear", ["t1", "s", "z"], ["q1"]),
        make("DequantizeLinear", ["q1", "s", "z"], ["d1"]),
        make("MatMul", ["d1", "w"], ["m"], name="product"),
        make("Add", ["t1", "m"] if shortcut == 0 else ["m", "t1"], ["r"], name="residual"),
        make("MatMul", ["d0", "w"], ["m2"], name="other"),
        make("Add", ["m2", "t0"], ["b"], name="beside"),
        make("Add", ["r", "b"], ["y"], name="sum"),
    ]
    model = graph_model(nodes, {"s": np.float32(0.1), "z": np.int8(0), "w": normal(8, 8)})
    assert quantize_residuals(model) == (["residual", "beside"] if known else ["residual"])
    (residual,) = (node for node in model.graph.node if node.name == "residual")
    assert residual.input[shortcut] == "d1"


def behind_a_product(name: str, folder: Path) -> tuple[Path, Feeds]:
    """A graph that a plain cast to FP16 breaks, behind a product that gives what it is given."""
    model, _, _ = planted()[name]
    inner = [node for node in model.graph.node if "x" in node.input]
    for node in inner:
        node.input[:] = ["given" if side == "x" else side for side in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("MatMul", ["x", "eye"], ["given"], "product"))
    eye = np.eye(planting.WIDTH, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(eye, "eye"))
    onnx.save(model, folder / "planted.onnx")
    values = np.random.default_rng(0).normal(size=(4, 4, 4, planting.WIDTH)).astype(np.float32)
    return folder / "planted.onnx", [{"x": batch} for batch in values]


@pytest.mark.parametrize("name", sorted(planted()))
def test_what_overflows_in_fp16_does_not_beside_int8_either(name: str, tmp_path: Path):
    """On a CPU no gate sees it: FP16 is computed in FP32 there."""
    source, feeds = behind_a_product(name, tmp_path)
    report = int8_from_fp32(source, tmp_path / "int8.onnx", feeds, policy=policy_named("linear-only"))
    assert report.lint is not None
    assert report.lint.findings
    made = fp16_answers(onnx.load(tmp_path / "int8.onnx"), feeds[0]["x"])
    assert cosine_rows(made, answers(onnx.load(source), feeds[0])[0]).min() > 0.97


def test_what_overflows_in_fp16_does_not_beside_fp8_either(tmp_path: Path):
    source, feeds = behind_a_product("RMS norm, written out", tmp_path)
    samples = stored.Batches({"x": np.concatenate([batch["x"] for batch in feeds])}, 4)
    l4, settings = load_target("l4"), Settings(scheme="fp8", evaluations=2, gate=0.9)
    assert quantize_onnx(source, samples, tmp_path / "out", target=l4, settings=settings).passed
    made = onnx.load(tmp_path / "out" / "model.onnx")
    types = types_of(made)
    assert [types[n.input[0]] for n in made.graph.node if n.op_type == "Pow"] == [onnx.TensorProto.FLOAT]


def test_a_builder_that_chooses_fp16_itself_hears_what_the_lint_kept(tmp_path: Path):
    source, feeds = behind_a_product("RMS norm, written out", tmp_path)
    report = int8_from_fp32(source, tmp_path / "int8.onnx", feeds, policy=policy_named("linear-only"))
    assert report.lint is not None
    lowered = lane_a_from_onnx(tmp_path / "int8.onnx", tmp_path / "a.onnx", keep_fp32=report.left_in_fp32)
    assert "mean" in report.lint.keep_fp32
    assert "mean/ReduceMean" in lowered.fp32_nodes, "it was written for an older operator set"
    assert set(report.lint.keep_fp32) - {"mean"} <= set(lowered.fp32_nodes)
