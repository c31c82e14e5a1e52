"""No GPU is here: the driver and the library are stand-ins that keep their rules, and double."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from edgeglm.compile.trt_api import load_trt
from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines import tensorrt_engine as module
from edgeglm.engines.plan import PlanMetadata, ShapeRange, TensorRecord
from edgeglm.engines.tensorrt_engine import TensorRtEngine
from tests.engines.stand_in_cuda import StandIn, StandInEngine, install


def one(batch: int) -> dict[str, ShapeRange]:
    return {"pixels": ShapeRange(min=(batch, 2), opt=(batch, 2), max=(batch, 2))}


ANY = {"pixels": ShapeRange(min=(1, 2), opt=(4, 2), max=(16, 2))}
RECORD = PlanMetadata(
    library="tensorrt",
    library_version="10.3.0",
    sms=(87,),
    onnx_sha256="a" * 64,
    plan_sha256=sha256_bytes(b"plan"),
    size_bytes=4,
    profiles=(ANY, one(1), one(8)),
    precision="fp16",
    inputs=(TensorRecord(name="pixels", dtype="float32", shape=(-1, 2)),),
    outputs=(TensorRecord(name="embedding", dtype="float32", shape=(-1, 2)),),
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, stand_in: StandIn) -> StandInEngine:
    return install(monkeypatch, stand_in, RECORD)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "engine.plan"
    path.write_bytes(b"plan")
    return path


def answer(engine: TensorRtEngine, rows: int, start: float = 0) -> None:
    """Ask for rows of fresh numbers and hold the answer against theirs."""
    pixels = np.arange(start, start + 2 * rows, dtype=np.float32).reshape(rows, 2)
    given = pixels.copy()
    embedding = engine.infer({"pixels": pixels})["embedding"]
    np.testing.assert_array_equal(embedding, pixels * 2)
    np.testing.assert_array_equal(pixels, given)


def test_a_bucket_runs_once_and_is_a_graph_from_then_on(library, stand_in, plan):
    with TensorRtEngine(plan, RECORD) as engine:
        for call in range(6):
            answer(engine, 8, call)
        assert engine.in_use == {2: "graph"}
        assert stand_in.launches == 6, "one to see whether it answers as the call did"
        assert [context.calls for context in library.contexts] == [2], "one run, one capture, then launches"


def test_each_bucket_has_a_context_and_graphs_survive_calls_of_other_shapes(library, stand_in, plan):
    with TensorRtEngine(plan, RECORD) as engine:
        for call in range(5):
            for rows in (1, 8, 3):
                answer(engine, rows, call)
        assert engine.in_use == {0: "no graph yet", 1: "graph", 2: "graph"}
        assert sorted(library.profiles_taken) == [0, 1, 2]
        assert stand_in.launches == 10
        addresses = {context._memory for context in library.contexts}
        assert len(addresses) == 1, "contexts that never run at once share the memory for activations"


def test_buckets_that_share_a_profile_have_contexts_and_graphs_of_their_own(library, stand_in, plan):
    library.profiles, library.shares_profiles = (ANY,), True
    shared = msgspec.structs.replace(
        RECORD, profiles=(ANY,), buckets=({"pixels": (1, 2)}, {"pixels": (8, 2)})
    )
    with TensorRtEngine(plan, shared) as engine:
        for call in range(5):
            for rows in (1, 8, 3):
                answer(engine, rows, call)
        assert engine.in_use == {0: "no graph yet", 1: "graph", 2: "graph"}
        assert library.profiles_taken == [0, 0, 0]
        assert engine.bucket_batches == (1, 8)


@pytest.mark.parametrize(("rows", "profile"), [(4, 2), (7, 2), (8, 2), (3, 0), (9, 0), (16, 0), (1, 1)])
def test_a_batch_is_filled_up_to_twice_its_rows_at_most(library, plan, rows, profile):
    with TensorRtEngine(plan, RECORD) as engine:
        for start in (0, 100):
            answer(engine, rows, start)
        assert list(engine.in_use) == [profile]
        assert engine.bucket_batches == (1, 8)


def test_an_output_without_a_batch_axis_is_never_filled_up(library, plan):
    summed = (TensorRecord(name="embedding", dtype="float32", shape=(1, 2)),)
    with TensorRtEngine(plan, msgspec.structs.replace(RECORD, outputs=summed)) as engine:
        engine.infer({"pixels": np.ones((7, 2), np.float32)})
        assert list(engine.in_use) == [0]
        assert engine.bucket_batches == ()


def test_a_shape_that_stays_is_captured_and_captured_anew_when_it_changes(library, stand_in, plan):
    with TensorRtEngine(plan, RECORD) as engine:
        for rows in (3, 3, 10, 3) * 5:
            answer(engine, rows)
        assert stand_in.launches == 0, "none of these stayed long enough"
        for call in range(12):
            answer(engine, 10, call)
        launches = stand_in.launches
        assert launches > 0
        answer(engine, 3)
        assert (stand_in.launches, engine.in_use) == (launches, {0: "no graph yet"})
        for call in range(12):
            answer(engine, 3, call)
        assert stand_in.launches > launches


def test_a_library_that_refuses_a_capture_is_run_call_by_call_and_says_so(library, stand_in, plan):
    library.refuses_capture = True
    with TensorRtEngine(plan, RECORD) as engine:
        for call in range(4):
            answer(engine, 8, call)
        assert "cannot be captured as a graph (the library refused)" in engine.in_use[2]
        assert stand_in.launches == 0
        assert library.contexts[0].calls == 5, "one attempt, not one a call"


def test_a_graph_that_answers_otherwise_is_not_kept(library, stand_in, plan):
    stand_in.set("lame_graphs", 1)
    with TensorRtEngine(plan, RECORD) as engine:
        for call in range(1, 5):
            answer(engine, 8, call)
        assert "answers otherwise" in engine.in_use[2]


def test_streamed_weights_are_run_without_graphs(library, stand_in, plan):
    streamed = msgspec.structs.replace(RECORD, options={"weight_streaming": True})
    with TensorRtEngine(plan, streamed) as engine:
        for call in range(3):
            answer(engine, 8, call)
        assert (stand_in.launches, engine.in_use) == (0, {2: "weights are streamed"})
        assert library.contexts[0]._memory == (0, 0)


def test_without_graphs_the_answers_are_the_same(library, stand_in, plan):
    with TensorRtEngine(plan, RECORD, graphs=False) as engine:
        for call in range(3):
            answer(engine, 8, call)
        assert (stand_in.launches, engine.in_use) == (0, {2: "not asked for"})


def test_a_jetson_copies_nothing_and_a_card_copies_once_each_way(library, stand_in, plan):
    stand_in.set("integrated", 1)
    with TensorRtEngine(plan, RECORD) as engine:
        for call in range(4):
            answer(engine, 8, call)
        assert stand_in.copies == 0
    stand_in.set("integrated", 0)
    library.profiles_taken.clear()
    with TensorRtEngine(plan, RECORD) as engine:
        for call in range(4):
            answer(engine, 8, call)
        assert stand_in.copies == 2 * 4 + 3, "and, once, to see whether the graph answers"


def test_a_thousand_calls_take_no_more_memory_than_the_first(library, stand_in, plan):
    with TensorRtEngine(plan, RECORD) as engine:
        for rows in (1, 8, 3, 5):
            answer(engine, rows)
        before = (stand_in.held, stand_in.blocks)
        for call in range(1000):
            answer(engine, (1, 8, 3, 5, 16, 7)[call % 6], call)
        assert (stand_in.held, stand_in.blocks) == before
    assert stand_in.given_back


def test_an_earlier_answer_stays_what_it_was(library, plan):
    with TensorRtEngine(plan, RECORD) as engine:
        first = engine.infer({"pixels": np.ones((8, 2), np.float32)})["embedding"]
        engine.infer({"pixels": np.full((8, 2), 5, np.float32)})
        assert first.tolist() == [[2, 2]] * 8


def test_an_engine_opened_in_one_thread_answers_in_others_and_closes_in_another(library, plan):
    engine, failures = TensorRtEngine(plan, RECORD), []
    engine.load()

    def work(start: int) -> None:
        try:
            for call in range(50):
                answer(engine, 1 + (start + call) % 8, start * 100 + call)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = threading.Thread(target=engine.close)
    last.start()
    last.join()
    assert failures == []


def test_a_closed_engine_and_a_batch_too_large_are_told(library, plan):
    with TensorRtEngine(plan, RECORD) as engine:
        answer(engine, 2)
        with pytest.raises(UserError, match=r"pixels of shape \(17, 2\) is outside the engine's profiles"):
            engine.infer({"pixels": np.ones((17, 2), np.float32)})
    with pytest.raises(UserError, match="is not loaded"):
        engine.infer({"pixels": np.ones((2, 2), np.float32)})
    library.profiles_taken.clear()
    with engine:
        answer(engine, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"library_version": "10.13.3"}, r"built by tensorrt 10\.13\.3, here is 10\.3\.0"),
        ({"sms": (110,)}, "built for SM 110, here is SM 87"),
        ({"plan_sha256": "b" * 64}, "was altered or cut off"),
        ({"profiles": (ANY,)}, "its record disagree"),
    ],
)
def test_a_foreign_or_altered_plan_is_never_run(change, words, library, plan: Path):
    engine = TensorRtEngine(plan, msgspec.structs.replace(RECORD, **change))
    with pytest.raises(UserError, match=words):
        engine.load()


def test_an_engine_that_finds_no_memory_says_so_and_gives_back_what_it_took(library, stand_in, plan):
    library.full = True
    with TensorRtEngine(plan, RECORD) as engine:
        with pytest.raises(EdgeglmError, match=r"has no memory to run .*; end other programs on the GPU"):
            answer(engine, 8)
        library.full = False
        stand_in.set("room", stand_in.held)
        with pytest.raises(EdgeglmError, match="cuMemAlloc_v2 failed with 2"):
            answer(engine, 8)


def test_a_plan_that_the_library_refuses_gives_the_driver_back(library, plan, monkeypatch):
    refuses = SimpleNamespace(deserialize_cuda_engine=lambda _: None)
    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", lambda _: refuses)
    with pytest.raises(EdgeglmError, match="cannot load"):
        TensorRtEngine(plan, RECORD).load()


def test_no_gpu_is_said_before_the_library_is_asked(library, plan: Path, monkeypatch):
    monkeypatch.setattr(module, "cuda_devices", lambda: ())
    with pytest.raises(UserError, match="here is no GPU"):
        TensorRtEngine(plan, RECORD).load()


def test_a_version_compatible_plan_may_run_the_code_that_it_brings(library: StandInEngine, plan: Path):
    """TensorRT refuses such a plan otherwise, and its self-test would fail."""
    library.brings_code = True
    with pytest.raises(EdgeglmError, match="cannot load"):
        TensorRtEngine(plan, RECORD).load()
    wide = msgspec.structs.replace(RECORD, options={"version_compatible": True})
    with TensorRtEngine(plan, wide) as engine:
        answer(engine, 8)


def test_weights_are_streamed_only_where_that_was_asked_for(library: StandInEngine, plan: Path):
    with TensorRtEngine(plan, RECORD):
        assert library.weight_streaming_budget_v2 == 1000, "all weights stay on the GPU"
    with TensorRtEngine(plan, msgspec.structs.replace(RECORD, options={"weight_streaming": True})):
        assert library.weight_streaming_budget_v2 == 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file')",
            r"libnvinfer\.so\.10: cannot",
        ),
        ("raise OSError('libnvinfer.so.10: wrong ELF class')", "wrong ELF class"),
        ("import a_module_that_it_needs", "No module named 'a_module_that_it_needs'"),
        ("this is no Python", "invalid syntax"),
    ],
    ids=["no library", "wrong library", "no dependency", "no package"],
)
def test_a_tensorrt_that_is_there_and_broken_is_the_users_to_mend(
    body: str, words: str, library: StandInEngine, plan: Path, tmp_path: Path, monkeypatch
):
    (tmp_path / "packages/tensorrt").mkdir(parents=True)
    (tmp_path / "packages/tensorrt/__init__.py").write_text(f"{body}\n")
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    with pytest.raises(
        UserError, match=f"tensorrt is installed but broken: .*{words}.*; install it again, or"
    ):
        TensorRtEngine(plan, RECORD).load()
    with pytest.raises(
        UserError, match=f"tensorrt is installed but broken: .*{words}.*; install it again, or"
    ):
        load_trt("tensorrt")


def test_a_driver_that_does_not_start_is_said(library: StandInEngine, plan: Path, monkeypatch):
    def start(_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", start)
    with pytest.raises(UserError, match=r"installed but broken: pybind11.*mend the driver"):
        TensorRtEngine(plan, RECORD).load()


def test_an_absent_library_is_named(plan: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="tensorrt is not installed here"):
        TensorRtEngine(plan, RECORD).load()
