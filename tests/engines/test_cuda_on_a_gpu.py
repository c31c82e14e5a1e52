"""The engine over the real driver of a GPU, with a doubling kernel in TensorRT's place.

So streams, page-locked and shared memory, captures and graphs run on any NVIDIA GPU, also on one that no
TensorRT at hand builds for.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

import numpy as np
import pytest

from edgeglm.core.errors import EdgeglmError
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.cuda_driver import WAYS, CaptureError, this_driver
from edgeglm.engines.tensorrt_engine import TensorRtEngine
from tests.engines.stand_in_cuda import StandInEngine, install
from tests.engines.test_tensorrt_engine import RECORD, answer

pytestmark = pytest.mark.gpu
KERNEL = Path(__file__).with_name("twice.ptx")


class Twice:
    """Loads ``twice.ptx`` into the current context and launches it."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._function: c_void_p | None = None

    def double(self, stream: int, to: int, source: int, size: int) -> bool:
        if self._function is None:
            module, function = c_void_p(), c_void_p()
            assert self._cuda.cuModuleLoadData(byref(module), KERNEL.read_bytes() + b"\0") == 0
            assert self._cuda.cuModuleGetFunction(byref(function), module, b"twice") == 0
            self._function = function
        values = (c_uint64(to), c_uint64(source), c_uint64(size // 4))
        pointers = (c_void_p * 3)(*(ctypes.cast(byref(value), c_void_p) for value in values))
        blocks = c_uint(-(-size // 4 // 128) or 1)
        one, threads, none = c_uint(1), c_uint(128), c_uint(0)
        grid = (blocks, one, one, threads, one, one, none)
        return bool(
            self._cuda.cuLaunchKernel(self._function, *grid, c_void_p(stream), pointers, c_void_p()) == 0
        )

    def capturing(self, stream: int) -> bool:
        status = c_int()
        assert self._cuda.cuStreamIsCapturing(c_void_p(stream), byref(status)) == 0
        return status.value != 0

    def free_bytes(self) -> int:
        free, total = c_size_t(), c_size_t()
        with this_driver() as driver, driver.bound():
            assert self._cuda.cuMemGetInfo_v2(byref(free), byref(total)) == 0
        return free.value

    def kind_of(self, address: int) -> int:
        """CU_POINTER_ATTRIBUTE_MEMORY_TYPE: 1 for page-locked host memory, 2 for the GPU's."""
        kind = c_uint()
        assert self._cuda.cuPointerGetAttribute(byref(kind), 2, c_uint64(address)) == 0
        return kind.value


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not cuda_devices():
        pytest.skip("no GPU is here")
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setenv("EDGEGLM_CUDA", request.param)
    return str(request.param)


@pytest.fixture
def twice(way: str) -> Twice:
    return Twice()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, twice: Twice) -> StandInEngine:
    return install(monkeypatch, twice, RECORD)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "engine.plan"
    path.write_bytes(b"plan")
    return path


def test_buckets_ranges_and_fills_answer_through_graphs(library, plan):
    with TensorRtEngine(plan, RECORD) as engine:
        for call in range(20):
            for rows in (1, 8, 5, 3, 16):
                answer(engine, rows, call)
        for call in range(12):
            answer(engine, 3, call)
        assert engine.in_use == {0: "graph", 1: "graph", 2: "graph"}
        assert library.contexts[0].calls < 60, "graphs were launched and not the context"


def test_memory_is_page_locked_on_the_host_and_the_gpus_own_on_a_card(library, twice, plan):
    with TensorRtEngine(plan, RECORD) as engine:
        answer(engine, 8)
        assert engine.driver is not None
        with engine.driver.bound():
            for buffer in engine._buckets[2]._buffers.values():
                assert twice.kind_of(buffer.host.ctypes.data) == 1
                assert twice.kind_of(buffer.device) == (1 if engine.driver.zero_copy else 2)


def test_a_thousand_calls_take_no_more_memory_of_the_gpu_than_the_first(library, twice, plan):
    with TensorRtEngine(plan, RECORD) as engine:
        for rows in (1, 8, 3, 16):
            answer(engine, rows)
        before = twice.free_bytes()
        for call in range(1000):
            answer(engine, (1, 8, 3, 5, 16, 7)[call % 6], call)
        assert before - twice.free_bytes() < 2 << 20


def test_engines_open_and_close_without_growth(library, twice, plan):
    def turn() -> None:
        library.profiles_taken.clear()
        with TensorRtEngine(plan, RECORD) as engine:
            for call in range(3):
                answer(engine, 8, call)

    turn()
    before = twice.free_bytes()
    for _ in range(50):
        turn()
    assert before - twice.free_bytes() < 2 << 20


def test_threads_share_an_engine_and_another_closes_it(library, plan):
    engine, failures = TensorRtEngine(plan, RECORD), []
    engine.load()

    def work(start: int) -> None:
        try:
            for call in range(100):
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


def test_a_capture_that_fails_leaves_the_stream_usable(way, twice):
    with this_driver() as driver, driver.bound():
        there, back = driver.buffer(1024), driver.buffer(1024)
        with pytest.raises(CaptureError):
            driver.captured(lambda: False)

        def waits() -> bool:
            driver.synchronize()  # not allowed while the stream is captured
            return True

        with pytest.raises(EdgeglmError):
            driver.captured(waits)
        there.host.view(np.float32)[:] = 3
        driver.upload(there, 1024)
        assert twice.double(driver.stream, back.device, there.device, 1024)
        driver.download(back, 1024)
        driver.synchronize()
        assert back.host.view(np.float32).tolist() == [6] * 256


def test_torch_or_cupy_beside_the_engine_see_the_same_context(library, plan):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    with TensorRtEngine(plan, RECORD) as engine:
        for call in range(4):
            answer(engine, 8, call)
            ones = torch.ones(1000, device="cuda")
            assert float((ones * 2).sum()) == 2000
