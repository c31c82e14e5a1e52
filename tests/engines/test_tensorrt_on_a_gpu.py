"""Engines built and run on the GPU at hand, by each TensorRT that is there, against ONNX Runtime's CPU."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeglm.core.errors import UserError
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.cuda_driver import WAYS, this_driver
from edgeglm.engines.plan import PlanMetadata
from edgeglm.engines.tensorrt_engine import TensorRtEngine
from edgeglm.evaluate.parity import cosine_rows

pytestmark = pytest.mark.gpu
pytest.importorskip("onnx")

LIBRARIES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
LENGTHS, BATCHES = (8, 16), (1, 4, 32)
Built = tuple[Path, PlanMetadata, Path]


@pytest.fixture(scope="module", params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> str:
    if not cuda_devices():
        pytest.skip("no GPU is here")
    if not any(importlib.util.find_spec(name) for name in LIBRARIES[request.param]):
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


def target_here() -> Any:
    """Return a target with the SM of GPU 0."""
    import msgspec

    from edgeglm.targets.schema import load_target

    sm = cuda_devices()[0].sm
    return msgspec.structs.replace(load_target("l4"), name="here", sm=sm)


def built(tower: str, folder: Path, library: str, write: Callable[..., Path]) -> Built:
    from edgeglm.compile.builder import engine_from_onnx
    from edgeglm.compile.contract import tower_profiles

    model = write(folder / f"{tower}.onnx")
    try:
        engine = engine_from_onnx(
            model,
            targets=[target_here()],
            library=library,  # type: ignore[arg-type]
            precision="fp16",
            profiles=tower_profiles(tower, (1, 4, 32), (1, 8, LENGTHS[-1]), BATCHES),
        )
    except UserError as error:  # TensorRT-RTX does not build for every data-centre GPU
        pytest.skip(str(error))
    plan, _ = engine.write(folder, tower)
    return plan, engine.metadata, model


@pytest.fixture(scope="module")
def text(library: str, tmp_path_factory: pytest.TempPathFactory) -> Built:
    from tests.compile.conftest import write_text_tower

    return built("text", tmp_path_factory.mktemp("text"), library, write_text_tower)


@pytest.fixture(scope="module")
def image(library: str, tmp_path_factory: pytest.TempPathFactory) -> Built:
    from tests.compile.conftest import write_image_tower

    return built("image", tmp_path_factory.mktemp("image"), library, write_image_tower)


def ids(batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[::2, length // 2 :] = 0
    return {"input_ids": rng.integers(0, 16, (batch, length)), "attention_mask": mask}


def pixels(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(seed).random((batch, 3, 4, 4), dtype=np.float32)}


def shapes() -> Iterator[tuple[int, int]]:
    """Yield buckets, batches that are filled up to one, and shapes that are none."""
    yield from ((batch, length) for batch in (1, 2, 4, 9, 17, 32) for length in (8, 16, 11))


@pytest.mark.parametrize("way", WAYS)
def test_every_bucket_answers_as_onnxruntime_does(text, way, monkeypatch):
    from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine

    if importlib.util.find_spec(way) is None:
        pytest.skip(f"{way} is not installed")
    monkeypatch.setenv("EDGEGLM_CUDA", way)
    plan, metadata, model = text
    with TensorRtEngine(plan, metadata) as engine, OnnxRuntimeEngine(model) as plain:
        for turn in range(3):
            for batch, length in shapes():
                feeds = ids(batch, length, turn)
                got, expected = engine.infer(feeds)["embedding"], plain.infer(feeds)["embedding"]
                assert got.shape == expected.shape
                assert cosine_rows(got, expected).min() > 0.999, (turn, batch, length)
        assert "graph" in engine.in_use.values(), engine.in_use


def test_graphs_answer_bit_for_bit_as_calls_without_them(image, text):
    for (plan, metadata, _), feeds in ((image, pixels), (text, lambda n, seed=0: ids(n, 16, seed))):
        with TensorRtEngine(plan, metadata) as graphs, TensorRtEngine(plan, metadata, graphs=False) as eager:
            for batch in (1, 3, 4, 32):
                for seed in range(4):
                    given = feeds(batch, seed)
                    got, expected = graphs.infer(given)["embedding"], eager.infer(given)["embedding"]
                    np.testing.assert_array_equal(got, expected)
            assert "graph" in graphs.in_use.values(), graphs.in_use
            assert "graph" not in eager.in_use.values()


def free_bytes() -> int:
    """Return the free memory of GPU 0."""
    import ctypes

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with this_driver() as driver, driver.bound():
        assert ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


def test_a_thousand_calls_take_no_more_memory_of_the_gpu_than_the_first(text):
    plan, metadata, _ = text
    with TensorRtEngine(plan, metadata) as engine:
        for batch, length in shapes():
            engine.infer(ids(batch, length))
        before = free_bytes()
        for call, (batch, length) in zip(range(1000), list(shapes()) * 60, strict=False):
            engine.infer(ids(batch, length, call))
        assert before - free_bytes() < 2 << 20
    gc.collect()


def test_page_locked_memory_is_what_calls_go_through(image):
    plan, metadata, _ = image
    with TensorRtEngine(plan, metadata) as engine:
        engine.infer(pixels(4))
        assert engine.driver is not None
        bucket = next(iter(engine._buckets.values()))
        with engine.driver.bound():
            for buffer in bucket._buffers.values():
                kind = host_memory_kind(buffer.host.ctypes.data)
                assert kind == 1, "1 is page-locked host memory, 0 none that the driver knows"


def host_memory_kind(address: int) -> int:
    """Return CU_POINTER_ATTRIBUTE_MEMORY_TYPE of an address, 0 for pageable memory."""
    import ctypes

    kind = ctypes.c_uint()
    asked = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute
    status = asked(ctypes.byref(kind), 2, ctypes.c_uint64(address))
    return kind.value if status == 0 else 0


def test_two_engines_in_threads_of_their_own_capture_and_answer_at_once(text):
    from concurrent.futures import ThreadPoolExecutor

    plan, metadata, _ = text

    def work(seed: int) -> list[np.ndarray]:
        with TensorRtEngine(plan, metadata) as engine:
            return [engine.infer(ids(batch, length, seed))["embedding"] for batch, length in shapes()]

    alone = [work(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for expected, got in zip(alone, pool.map(work, range(2)), strict=True):
            for a, b in zip(expected, got, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_runner_serves_through_graphs(text):
    import asyncio

    from edgeglm.runtime.config import RunnerConfig
    from edgeglm.runtime.contract import TowerSource
    from edgeglm.runtime.runner import Runner

    plan, metadata, _ = text
    engines: list[TensorRtEngine] = []

    def make() -> TensorRtEngine:
        engines.append(TensorRtEngine(plan, metadata))
        return engines[-1]

    source = TowerSource(
        engine=make, ragged={"input_ids": 0, "attention_mask": 0}, length_buckets=(*LENGTHS,)
    )

    async def serve() -> list[np.ndarray]:
        async with Runner({"text": source}, RunnerConfig()) as runner:
            samples = [{name: row[0] for name, row in ids(1, 5 + n % 11, n).items()} for n in range(200)]
            answers = await asyncio.gather(*(runner.infer("text", sample) for sample in samples))
            return [answer["embedding"] for answer in answers]

    started = time.monotonic()
    answers = asyncio.run(serve())
    assert len(answers) == 200
    assert all(np.isfinite(answer).all() for answer in answers)
    assert time.monotonic() - started < 120
    assert engines
