"""The driver is a stand-in that keeps the rules which a laptop without a GPU cannot check otherwise."""

# ruff: noqa: N802  (the names are the driver's)

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest

from edgeglm.core.errors import EdgeglmError
from edgeglm.engines.cuda_memory import CudaMemory

INVALID_CONTEXT, OUT_OF_MEMORY = 201, 2


class Driver:
    """``libcuda`` with memory for so many bytes, and a current context by thread, as the real one has."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held: dict[int, int] = {}
        self.current = threading.local()
        self.waiting = 0
        self.retained = 0
        self.stream_status = 0

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = 5
        self.retained += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        self.retained -= 1
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.current.context = context.value
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        stream._obj.value = 7
        return self.stream_status

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        self.waiting = 0
        return 0

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        if getattr(self.current, "context", None) != 5:
            return INVALID_CONTEXT
        if sum(self.held.values()) + size.value > self.room:
            return OUT_OF_MEMORY
        pointer._obj.value = 1000 + len(self.held)
        self.held[pointer._obj.value] = size.value
        return 0

    def cuMemFree_v2(self, pointer: Any) -> int:
        del self.held[pointer.value]  # a KeyError is what a second free of one buffer comes to
        return 0

    def cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        assert stream.value == 7, "on the engine's own stream, or the engine may read before it is there"
        self.waiting += 1
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver(room=100)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    return driver


def test_a_batch_too_large_for_the_board_leaves_the_next_one_a_buffer_of_its_own(driver: Driver):
    with CudaMemory() as memory:
        memory.buffer("pixels", 60)
        with pytest.raises(EdgeglmError, match="cuMemAlloc_v2 failed with 2"):
            memory.buffer("pixels", 200)
        assert memory.buffer("pixels", 40) in driver.held
    assert driver.held == {}
    assert driver.retained == 0


def test_an_engine_opened_in_one_thread_runs_and_closes_in_another(driver: Driver):
    memory, failures = CudaMemory().__enter__(), []

    def work() -> None:
        try:
            memory.bind()
            memory.upload("pixels", np.ones(4, np.float32))
            memory.synchronize()
            memory.__exit__(None, None, None)
        except EdgeglmError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    assert (driver.held, driver.retained) == ({}, 0)


def test_uploads_wait_in_the_stream_and_their_arrays_live_until_it_is_done(driver: Driver):
    with CudaMemory() as memory:
        memory.upload("pixels", np.ones((2, 2), np.float32).T)
        assert (driver.waiting, len(memory._on_the_way)) == (1, 1)
        memory.synchronize()
        assert (driver.waiting, len(memory._on_the_way)) == (0, 0)


def test_a_stream_that_cannot_be_made_gives_the_context_back(driver: Driver):
    driver.stream_status = OUT_OF_MEMORY
    with pytest.raises(EdgeglmError, match="cuStreamCreate failed with 2"):
        CudaMemory().__enter__()
    assert driver.retained == 0
