"""Bound memory is kept from call to call: no call may see or change what belongs to another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgeglm.core.errors import UserError
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine

onnx = pytest.importorskip("onnx")
SHAPES = [(1, 3), (4, 3), (2, 7), (4, 3), (1, 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["numbers", "x"], ["sum"]),
        helper.make_node("Mul", ["numbers", "x"], ["product"]),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "L"]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "L"]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "L"]) for name in ("sum", "product")
    ]
    path = tmp_path_factory.mktemp("model") / "two.onnx"
    graph = helper.make_graph(nodes, "two", inputs, outputs)
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def feeds_of(seed: int, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"ids": rng.integers(0, 99, shape), "x": rng.random(shape, dtype=np.float32)}


def check(engine: OnnxRuntimeEngine, plain: OnnxRuntimeEngine) -> None:
    calls = [feeds_of(seed, shape) for seed, shape in enumerate(SHAPES)]
    copies = [{name: array.copy() for name, array in feeds.items()} for feeds in calls]
    answers = [engine.infer(feeds) for feeds in calls]
    for feeds, copy, answer in zip(calls, copies, answers, strict=True):
        for name, array in copy.items():
            np.testing.assert_array_equal(feeds[name], array)
        for name, array in plain.infer(copy).items():
            np.testing.assert_allclose(answer[name], array, rtol=1e-6)


def test_bound_calls_answer_as_plain_ones_and_earlier_answers_stay(model):
    with OnnxRuntimeEngine(model, io_binding=True) as bound, OnnxRuntimeEngine(model) as plain:
        assert bound.io_binding
        assert not plain.io_binding
        check(bound, plain)


def test_views_and_transposed_arrays_are_read_rightly(model):
    wide = feeds_of(1, (6, 8))
    feeds = {"ids": wide["ids"][::2, ::2], "x": wide["x"].reshape(8, 6).T[::2, ::2]}
    with OnnxRuntimeEngine(model, io_binding=True) as bound, OnnxRuntimeEngine(model) as plain:
        for name, array in plain.infer(feeds).items():
            np.testing.assert_array_equal(bound.infer(feeds)[name], array)


def test_more_shapes_than_buffers_are_kept(model):
    with OnnxRuntimeEngine(model, io_binding=True) as bound:
        for length in (*range(1, 60), *range(1, 60)):
            feeds = feeds_of(length, (2, length))
            np.testing.assert_array_equal(bound.infer(feeds)["sum"], feeds["ids"].astype("f4") + feeds["x"])


def test_threads_that_share_an_engine_get_their_own_answers(model):
    with OnnxRuntimeEngine(model, io_binding=True) as bound, ThreadPoolExecutor(4) as pool:
        calls = [feeds_of(seed, (2, 5)) for seed in range(200)]
        for feeds, answer in zip(calls, pool.map(bound.infer, calls), strict=True):
            np.testing.assert_array_equal(answer["product"], feeds["ids"].astype("f4") * feeds["x"])


def test_a_closed_engine_says_so(model):
    engine = OnnxRuntimeEngine(model, io_binding=True)
    with engine:
        engine.infer(feeds_of(0, (1, 1)))
    with pytest.raises(UserError, match="not loaded"):
        engine.infer(feeds_of(0, (1, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_bound_calls_on_a_gpu_answer_as_the_cpu_does(model, provider):
    engine = OnnxRuntimeEngine(model, providers=(provider,), io_binding=True)
    try:
        engine.load()
    except UserError as error:
        pytest.skip(str(error))
    with engine, OnnxRuntimeEngine(model) as plain:
        check(engine, plain)
