"""Inputs and samples as others have them: names that are no file's, tensors that are empty at times."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

import onnx
from onnx import helper, numpy_helper
from PIL import Image

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.conversion import int8_by_plan, ranges_from_batches, whole_plan
from edgeglm.calibration.drawing import Drawing, batches_for_model, calibration_set_for_model
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.intake import Reading, candidates_from_data
from edgeglm.calibration.outcome import Settings
from edgeglm.calibration.precision import fidelity
from edgeglm.calibration.preparation import prepared_model
from edgeglm.calibration.smooth import smoothed
from edgeglm.core.errors import UserError
from edgeglm.engines.protocol import TensorSpec
from edgeglm.export.anonymous import save_deterministic
from edgeglm.export.fp16_lint import lint_file
from edgeglm.export.lanes import lane_file
from edgeglm.targets.schema import load_target

WIDTH = 64
_FLOAT = onnx.TensorProto.FLOAT


def _file(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, Any], x: str = "x") -> Path:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info(x, _FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", _FLOAT, ["n", WIDTH])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    made: np.ndarray = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return made


@pytest.mark.parametrize("name", ["serving/input_1:0", "/x", "../x", "file", "allow_pickle"])
def test_an_input_may_have_any_name(tmp_path: Path, name: str) -> None:
    nodes = [
        helper.make_node("MatMul", [name, "one"], ["a"], "one/MatMul"),
        helper.make_node("MatMul", ["a", "two"], ["y"], "two/MatMul"),
    ]
    weights = {"one": _normal(WIDTH, WIDTH), "two": _normal(WIDTH, WIDTH, seed=1)}
    source = _file(tmp_path / "m.onnx", nodes, weights, name)
    x = _normal(16, WIDTH, seed=2)
    with ZipFile(tmp_path / "x.npz", "w") as archive, archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array(file, x)
    drawn = calibration_set_for_model(
        tmp_path / "x.npz", source, tmp_path / "in" / "set", drawing=Drawing(samples=16, batch_size=4)
    )
    found = batches_for_model(drawn, source)
    assert sorted(map(tuple, np.concatenate([batch[name] for batch in found]))) == sorted(map(tuple, x))
    assert {path.name for path in (tmp_path / "in").rglob("*")} == {"set", "model.npz", "calibration.json"}
    outcome = quantize_onnx(
        source, found, tmp_path / "out", target=load_target("t4"), settings=Settings(evaluations=1, gate=0.9)
    )
    assert outcome.passed
    assert outcome.fp16 is not None, outcome.fp16_left_out


def _chosen_rows() -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """Return a model whose second product sees the rows of x that begin above 0: none, in some batches."""
    nodes = [
        helper.make_node("Gather", ["x", "zero"], ["first"], "first", axis=1),
        helper.make_node("Greater", ["first", "limit"], ["high"], "high"),
        helper.make_node("Compress", ["x", "high"], ["chosen"], "choose", axis=0),
        helper.make_node("MatMul", ["chosen", "one"], ["a"], "inner/MatMul"),
        helper.make_node("ReduceSum", ["a"], ["sum"], "sum"),
        helper.make_node("MatMul", ["x", "two"], ["b"], "outer/MatMul"),
        helper.make_node("Add", ["b", "sum"], ["y"], "add"),
    ]
    weights = {"one": _normal(WIDTH, WIDTH) / 9, "two": _normal(WIDTH, WIDTH, seed=1)}
    return nodes, {**weights, "zero": np.int64(0), "limit": np.float32(0)}


@pytest.mark.parametrize("smooth", [False, True])
def test_a_tensor_that_is_empty_in_some_batches_has_the_range_of_the_others(
    tmp_path: Path, smooth: bool
) -> None:
    source, x = _file(tmp_path / "m.onnx", *_chosen_rows()), _normal(32, WIDTH)
    x[:16, 0] = -1
    x[16:, 0] = 1
    batches = Batches({"x": x}, 8)
    prepared = prepared_model(source)
    if smooth:
        prepared = smoothed(prepared, batches, 0.5)
        save_deterministic(prepared.model, tmp_path / "smooth.onnx")
        assert fidelity(tmp_path / "smooth.onnx", source, batches).max_abs < 1e-3
    ranges = ranges_from_batches(prepared, batches, ("max", "percentile", "entropy", "mse"))
    if not smooth:
        assert ranges["chosen"]["max"] == (float(x[16:].min()), float(x[16:].max()))
    int8_by_plan(prepared, tmp_path / "int8.onnx", whole_plan(prepared, "u8s8"), ranges)
    assert fidelity(tmp_path / "int8.onnx", source, batches).min_cosine > 0.99


def test_a_tensor_that_is_empty_in_every_batch_is_named(tmp_path: Path) -> None:
    source, x = _file(tmp_path / "m.onnx", *_chosen_rows()), _normal(32, WIDTH)
    x[:, 0] = -1
    with pytest.raises(UserError, match=r"'(a|chosen)' is empty in every batch.*give samples that reach it"):
        ranges_from_batches(prepared_model(source), Batches({"x": x}, 8), ("max", "mse"))


def _looked_up() -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """Return a model of opset 17 that opset 21 has no words for: its mean says its axes in an attribute."""
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], "ids", to=onnx.TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["rows"], "look-up"),
        helper.make_node("ReduceMean", ["rows"], ["mean"], "mean", axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "one"], ["y"], "one/MatMul"),
    ]
    return nodes, {"table": _normal(300, WIDTH), "one": _normal(WIDTH, WIDTH, seed=1)}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tables_become_smaller_whatever_the_models_opset(tmp_path: Path, precision: str) -> None:
    source = _file(tmp_path / "m.onnx", *_looked_up())
    batches = Batches({"x": np.random.default_rng(3).integers(0, 300, (16, WIDTH)).astype(np.float32)}, 4)
    prepared = prepared_model(source)
    plan = msgspec.structs.replace(whole_plan(prepared, "dynamic"), embeddings=precision)
    int8_by_plan(prepared, tmp_path / "out.onnx", plan, {})
    made = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(made, full_check=True)
    assert {entry.version for entry in made.opset_import if not entry.domain} == {17}
    assert fidelity(tmp_path / "out.onnx", source, batches).min_cosine > 0.98


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(embeddings="int8"), r"no embedding table.*leave the option out"),
        (Settings(smooth=0.5, op_types=("Gemm",)), r"no MatMul that becomes INT8.*leave the option out"),
    ],
)
def test_an_option_that_a_model_has_nothing_for_is_refused(
    tmp_path: Path, settings: Settings, message: str
) -> None:
    gemm = helper.make_node("Gemm", ["x", "one"], ["y"], "one/Gemm")
    source = _file(tmp_path / "m.onnx", [gemm], {"one": _normal(WIDTH, WIDTH)})
    batches = Batches({"x": _normal(16, WIDTH)}, 4)
    with pytest.raises(UserError, match=message):
        quantize_onnx(source, batches, tmp_path / "out", target=load_target("t4"), settings=settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reading", [Reading(mean=(0.5, 0.5, 0.5)), Reading(lowercase=True)])
def test_how_pictures_and_texts_are_read_is_refused_for_arrays(tmp_path: Path, reading: Reading) -> None:
    gemm = helper.make_node("Gemm", ["x", "one"], ["y"], "one/Gemm")
    source = _file(tmp_path / "m.onnx", [gemm], {"one": _normal(WIDTH, WIDTH)})
    np.savez(tmp_path / "x.npz", x=_normal(16, WIDTH))
    with pytest.raises(UserError, match=r"--(mean|lowercase) would change nothing of .*x.npz.*leave it out"):
        calibration_set_for_model(
            tmp_path / "x.npz", source, tmp_path / "set", drawing=Drawing(samples=16, reading=reading)
        )


def test_a_tokenizer_is_refused_for_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    spec = TensorSpec(name="x", dtype="float32", shape=("n", 3, 8, 8))
    with pytest.raises(UserError, match=r"--tokenizer would change nothing of .*: it is not for pictures"):
        candidates_from_data(tmp_path, [spec], reading=Reading(), tokenizer=tmp_path / "tokenizer.json")


def test_arrays_of_the_other_byte_order_hold_the_same_numbers(tmp_path: Path) -> None:
    gemm = helper.make_node("Gemm", ["x", "one"], ["y"], "one/Gemm")
    source, x = _file(tmp_path / "m.onnx", [gemm], {"one": _normal(WIDTH, WIDTH)}), _normal(16, WIDTH)
    foreign = x.astype(x.dtype.newbyteorder("S"))
    np.savez(tmp_path / "foreign.npz", x=foreign)
    np.savez(tmp_path / "own.npz", x=x)
    assert lint_file(source, data=tmp_path / "foreign.npz").findings == ()
    assert Batches({"x": foreign}, 8)[0]["x"].dtype.isnative
    specs = [TensorSpec(name="x", dtype="float32", shape=("n", WIDTH))]
    found = [
        candidates_from_data(tmp_path / f"{name}.npz", specs, reading=Reading())
        for name in ("own", "foreign")
    ]
    assert found[0].digests == found[1].digests  # else no overlap with an evaluation would be seen
    assert found[1].tensors([3])["x"].tolist() == x[3:4].tolist()


def test_samples_that_are_all_equal_are_refused(tmp_path: Path) -> None:
    gemm = helper.make_node("Gemm", ["x", "one"], ["y"], "one/Gemm")
    source = _file(tmp_path / "m.onnx", [gemm], {"one": _normal(WIDTH, WIDTH)})
    np.savez(tmp_path / "x.npz", x=np.zeros((16, WIDTH), np.float32))
    with pytest.raises(
        UserError, match=r"all 16 samples drawn for model are equal.*give samples that differ"
    ):
        calibration_set_for_model(tmp_path / "x.npz", source, tmp_path / "set", drawing=Drawing(samples=16))
    assert not (tmp_path / "set").exists()


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Return a good model of two products; a test writes it again with what is wrong."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], "cast", to=_FLOAT),
        helper.make_node("MatMul", ["f", "one"], ["a"], "one/MatMul"),
        helper.make_node("MatMul", ["a", "two"], ["y"], "two/MatMul"),
    ]
    return _file(tmp_path / "m.onnx", nodes, {"one": _normal(WIDTH, WIDTH), "two": _normal(WIDTH, WIDTH)})


def test_a_float64_input_is_refused_for_tensorrt_and_taken_on_a_cpu(odd: Path, tmp_path: Path) -> None:
    model = onnx.load(odd)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    onnx.save(model, odd)
    batches = Batches({"x": _normal(16, WIDTH).astype(np.float64)}, 4)
    said = r"the input 'x' of m.onnx is float64, which TensorRT does not have; export it as float32"
    with pytest.raises(UserError, match=said):
        quantize_onnx(odd, batches, tmp_path / "out", target=load_target("t4"))
    for lane in ("A", "B"):
        with pytest.raises(UserError, match=said):
            lane_file(odd, tmp_path / "lowered.onnx", lane)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    prepared = prepared_model(odd)
    int8_by_plan(prepared, tmp_path / "cpu.onnx", whole_plan(prepared, "dynamic"), {})
    assert fidelity(tmp_path / "cpu.onnx", odd, batches).min_cosine > 0.98


def test_an_input_without_a_shape_is_told_from_one_without_axes(odd: Path, tmp_path: Path) -> None:
    model = onnx.load(odd)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, odd)
    np.savez(tmp_path / "x.npz", x=_normal(16, WIDTH))
    said = r"the input 'x' of m.onnx has no shape, not even a number of axes; export it with one"
    with pytest.raises(UserError, match=said):
        calibration_set_for_model(tmp_path / "x.npz", odd, tmp_path / "set", drawing=Drawing())
    with pytest.raises(UserError, match=said):
        prepared_model(odd)
    with pytest.raises(UserError, match=said):
        lane_file(odd, tmp_path / "lowered.onnx", "A")
    spec = TensorSpec(name="x", dtype="float32", shape=())
    with pytest.raises(UserError, match="it has no axis for samples"):
        candidates_from_data(tmp_path / "x.npz", [spec], reading=Reading())


def test_nodes_of_one_name_are_told_as_such(odd: Path, tmp_path: Path) -> None:
    model = onnx.load(odd)
    for node in model.graph.node[1:]:
        node.name = "twin"
    onnx.save(model, odd)
    np.savez(tmp_path / "x.npz", x=_normal(16, WIDTH))
    with pytest.raises(UserError, match=r"\(twin\)\.?; give each node a name of its own$"):
        calibration_set_for_model(tmp_path / "x.npz", odd, tmp_path / "set", drawing=Drawing())
