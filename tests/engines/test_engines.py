"""An engine must say plainly what it takes, and refuse the rest before the backend does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeglm.core.errors import UserError
from edgeglm.engines.fake import FakeEngine
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.plan import plan_metadata_from_file
from edgeglm.engines.protocol import TensorSpec
from edgeglm.engines.timing import compare_latency, measure_latency

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["ids", "mask"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "L"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "L"]),
        ],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", "L"])],
    )
    path = tmp_path_factory.mktemp("model") / "text.onnx"
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def feeds(batch: int = 2, length: int = 3) -> dict[str, np.ndarray]:
    ids = np.arange(batch * length, dtype=np.int64).reshape(batch, length)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_an_onnx_file_runs_at_any_batch_and_length(model: Path) -> None:
    with OnnxRuntimeEngine(model, threads=1) as engine:
        assert engine.inputs[0] == TensorSpec(name="input_ids", dtype="int64", shape=("B", "L"))
        assert str(engine.outputs[0]) == "embedding float32[B, L]"
        for batch, length in ((1, 1), (4, 7)):
            given = feeds(batch, length)
            np.testing.assert_array_equal(engine.infer(given)["embedding"], given["input_ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "no feed for input_ids; it takes input_ids int64"),
        ({"ids": np.ones((2, 3))}, "no input is named ids"),
        ({"input_ids": np.ones((2, 3), np.int32)}, r"is int32, .*astype\('int64'\)"),
        ({"input_ids": np.ones(3, np.int64)}, "give it 2 dimensions"),
        ({"input_ids": np.ones((0, 3), np.int64)}, "empty along axis 0"),
        ({"attention_mask": np.ones((2, 4), np.int64)}, "L is 3 in input_ids and 4 in attention_mask"),
        ({"input_ids": [[1, 2, 3]]}, "feed a numpy array"),
    ],
)
def test_a_feed_that_does_not_fit_says_what_would(
    model: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    wrong = {name: array for name, array in {**feeds(), **change}.items() if array is not None}
    with OnnxRuntimeEngine(model, threads=1) as engine, pytest.raises(UserError, match=message):
        engine.infer(wrong)


@pytest.mark.parametrize("given", [None, [feeds()], "pixels"])
def test_feeds_that_are_no_mapping_are_told_what_is_taken(model: Path, given: Any) -> None:
    words = r"the feeds are a \w+; give {input name: array}, it takes input_ids int64\[B, L\]"
    with OnnxRuntimeEngine(model, threads=1) as engine, pytest.raises(UserError, match=words):
        engine.infer(given)


def test_a_fixed_dimension_is_checked() -> None:
    spec = TensorSpec(name="pixels", dtype="float32", shape=("B", 3))
    out = TensorSpec(name="y", dtype="float32", shape=("B",))
    with FakeEngine(inputs=[spec], outputs=[out], function=lambda f: [f["pixels"].sum(1)]) as engine:
        assert engine.infer({"pixels": np.ones((2, 3), np.float32)})["y"].tolist() == [3.0, 3.0]
        with pytest.raises(UserError, match="make axis 1 3 long"):
            engine.infer({"pixels": np.ones((2, 4), np.float32)})
        assert engine.calls == [{"pixels": (2, 3)}]


def test_a_broken_or_missing_model_is_a_user_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ONNX file at"):
        OnnxRuntimeEngine(tmp_path / "none.onnx").load()
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"cannot load .*broken\.onnx"):
        OnnxRuntimeEngine(broken).load()


def test_a_path_that_cannot_be_told_to_cpp_is_told_and_not_blamed_on_the_model(
    model: Path, tmp_path: Path
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    shutil.copy(model, folder / "text.onnx")
    with pytest.raises(UserError, match=r"not UTF-8, .*; move it into a folder whose name is UTF-8"):
        OnnxRuntimeEngine(folder / "text.onnx").load()


def test_wrong_options_name_the_right_ones(model: Path) -> None:
    with pytest.raises(UserError, match="CPUExecutionProvider"):
        OnnxRuntimeEngine(model, providers=("CPUExecutionProvidr",)).load()
    for threads in (0, -1, 2.5, True, "2", None):
        with pytest.raises(UserError, match=f"threads is {threads!r}; give a whole number of at least 1"):
            OnnxRuntimeEngine(model, threads=threads)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="extended"):
        OnnxRuntimeEngine(model, optimization="most")  # type: ignore[arg-type]


@pytest.mark.parametrize("io_binding", [False, True])
def test_an_engine_that_is_closed_says_so(model: Path, io_binding: bool) -> None:
    engine = OnnxRuntimeEngine(model, threads=1, io_binding=io_binding)
    with pytest.raises(UserError, match="not loaded"):
        engine.infer(feeds())
    with engine:
        engine.infer(feeds())
    with pytest.raises(UserError, match="not loaded"):
        engine.infer(feeds())
    with pytest.raises(UserError, match="was closed during a call; open it again"):
        engine.infer_checked(feeds())  # whoever was past the checks as it was closed
    engine.close()


def fake(seconds: float = 0.0, failures: tuple[Exception, ...] = ()) -> FakeEngine:
    spec = TensorSpec(name="x", dtype="float32", shape=("B",))
    return FakeEngine(
        inputs=[spec], outputs=[spec], function=lambda f: [f["x"]], seconds=seconds, failures=failures
    )


def test_the_slower_engine_is_measured_slower_and_both_equally_often() -> None:
    given = {"x": np.zeros(1, np.float32)}
    with fake(seconds=0.003) as slow, fake() as fast:
        result = compare_latency({"slow": (slow, given), "fast": (fast, given)}, rounds=7, warmup=1)
        assert result["slow"].median_ms >= 3.0 > result["fast"].median_ms
        assert result["slow"].p90_ms >= result["slow"].median_ms
        assert len(slow.calls) == len(fast.calls) == 8
        assert measure_latency(fast, given, rounds=7).rounds == 7
        with pytest.raises(ValueError, match="at least 7"):
            measure_latency(fast, given, rounds=3)


def test_the_fake_fails_on_demand() -> None:
    with fake(failures=(RuntimeError("boom"),)) as engine:
        with pytest.raises(RuntimeError, match="boom"):
            engine.infer({"x": np.zeros(1, np.float32)})
        engine.infer({"x": np.zeros(1, np.float32)})


@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_wrong_number_of_outputs_is_told_with_what_was_declared(given: int) -> None:
    specs = [TensorSpec(name=name, dtype="float32", shape=("B", 2)) for name in ("mean", "spread")]
    rows = np.zeros((1, 2), np.float32)
    with (
        FakeEngine(
            inputs=specs[:1], outputs=specs, function=lambda _: [rows] * given, name="two.onnx"
        ) as engine,
        pytest.raises(
            UserError, match=rf"two.onnx declares 2 outputs \(mean .*, spread .*\) and gave {given}; export"
        ),
    ):
        engine.infer({"mean": rows})


def test_a_broken_engine_record_is_a_user_error(tmp_path: Path) -> None:
    for content in (b"", b"{", b'{"schema": 1}', b'{"schema": 2}', b"\xff"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match="build the engine again"):
            plan_metadata_from_file(tmp_path / "a.json")
