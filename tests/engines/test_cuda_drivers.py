"""The two ways to the CUDA driver, on a stand-in that keeps the rules a laptop cannot check otherwise."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines import cuda_ctypes, cuda_driver
from edgeglm.engines.cuda_ctypes import CtypesDriver
from edgeglm.engines.cuda_driver import CaptureError, this_driver
from tests.engines.stand_in_cuda import StandIn

CALLS = """
import numpy as np
from edgeglm.engines.cuda_driver import this_driver
from tests.engines.stand_in_cuda import StandIn
from pathlib import Path

stand_in = StandIn(Path({library!r}))
stand_in.set("integrated", {integrated})
for turn in range(3):
    with this_driver() as driver:
        with driver.bound():
            there, back = driver.buffer(64), driver.buffer(64)
            driver.scratch(1000)
            given, got = there.host.view(np.float32), back.host.view(np.float32)

            def work() -> bool:
                driver.upload(there, 64)
                stand_in.library.fake_double(driver.stream, back.device, there.device, 64)
                driver.download(back, 64)
                return True

            given[:] = 1
            work()
            driver.synchronize()
            assert got.tolist() == [2] * 16
            graph = driver.captured(work)
            for value in range(20):
                given[:] = value
                driver.launch(graph)
                driver.synchronize()
                assert got.tolist() == [2 * value] * 16, value
            driver.drop(graph)
        assert driver.zero_copy == bool({integrated})
        assert (stand_in.copies == 0) == driver.zero_copy
        assert stand_in.flags == 1, "a non-blocking stream"
        name = driver.name
    del there, back, given, got, work
    assert stand_in.given_back
print(name, stand_in.retained)
"""


def calls(way: str, libcuda: Path, repository: Path, *, integrated: int) -> str:
    """Run the calls in a process that finds the stand-in as ``libcuda.so.1``; return the last line."""
    environment = {
        **os.environ,
        "EDGEGLM_CUDA": way,
        "LD_LIBRARY_PATH": f"{libcuda.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": str(repository),
    }
    code = CALLS.format(library=str(libcuda), integrated=integrated)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize("integrated", [0, 1])
def test_ctypes_copies_captures_and_replays_and_shares_memory_on_a_jetson(libcuda, repository, integrated):
    assert calls("ctypes", libcuda, repository, integrated=integrated) == "ctypes 0"


@pytest.mark.parametrize("integrated", [0, 1])
def test_pycuda_does_the_same_through_its_own_objects(libcuda, repository, integrated):
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("pycuda is not installed; scripts/jetson-pycuda builds it on a board")
    words = calls("pycuda", libcuda, repository, integrated=integrated)
    assert words.startswith("pycuda 20")
    assert words.endswith(" 1"), "the primary context is retained once for the process, and kept"


def test_the_tests_that_wait_for_a_gpu_pass_over_the_stand_in(libcuda, repository):
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libcuda.parent)}
    tests = "tests/engines/test_cuda_on_a_gpu.py"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", tests]
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout, done.stdout


def test_an_address_above_four_gigabytes_is_not_cut_off(stand_in: StandIn):
    with CtypesDriver() as driver, driver.bound():
        assert driver.scratch(16) > 0xFFFFFFFF
        assert driver.buffer(16).device > 0xFFFFFFFF


def test_a_gpu_without_room_says_so_and_what_was_taken_is_given_back(stand_in: StandIn):
    stand_in.set("room", 1000)
    with CtypesDriver() as driver, driver.bound():
        driver.scratch(600)
        with pytest.raises(EdgeglmError, match="cuMemAlloc_v2 failed with 2"):
            driver.scratch(600)


def test_a_driver_opened_in_one_thread_works_and_closes_in_another(stand_in: StandIn):
    driver, failures = CtypesDriver().__enter__(), []

    def work() -> None:
        try:
            with driver.bound():
                buffer = driver.buffer(8)
                driver.upload(buffer, 8)
                driver.synchronize()
            driver.__exit__(None, None, None)
        except EdgeglmError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_a_call_without_the_context_is_an_error_and_no_crash(stand_in: StandIn):
    with CtypesDriver() as driver, pytest.raises(EdgeglmError, match="failed with 201"):
        driver.buffer(8)


def test_a_stream_that_cannot_be_made_gives_the_context_back(stand_in: StandIn):
    stand_in.set("stream_status", 2)
    with pytest.raises(EdgeglmError, match="cuStreamCreate failed with 2"):
        CtypesDriver().__enter__()


def test_what_cannot_be_captured_leaves_the_stream_usable(stand_in: StandIn):
    with CtypesDriver() as driver, driver.bound():
        buffer = driver.buffer(8)

        def allocates() -> bool:
            driver.scratch(8)
            return True

        with pytest.raises(CaptureError, match="the library refused"):
            driver.captured(lambda: False)
        with pytest.raises(EdgeglmError, match="cuMemAlloc_v2 failed with 900"):
            driver.captured(allocates)
        stand_in.set("poison_capture", 1)
        with pytest.raises(CaptureError, match="CUDA error 901"):
            driver.captured(lambda: True)
        driver.upload(buffer, 8)
        driver.synchronize()


def test_no_driver_and_an_old_one_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_ctypes, "LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(UserError, match="no CUDA driver here"):
        CtypesDriver()
    monkeypatch.setattr(cuda_ctypes, "LIBRARY", "libc.so.6")
    with pytest.raises(UserError, match="older than CUDA 11"):
        CtypesDriver()


def test_the_way_can_be_chosen_and_a_wrong_one_is_named(monkeypatch, stand_in: StandIn):
    monkeypatch.setenv("EDGEGLM_CUDA", "cupy")
    with pytest.raises(UserError, match="unknown way to CUDA"):
        this_driver()
    monkeypatch.setattr(cuda_driver, "_is_there", lambda _: False)
    monkeypatch.setenv("EDGEGLM_CUDA", "pycuda")
    with pytest.raises(UserError, match="scripts/jetson-pycuda"):
        this_driver()
    monkeypatch.delenv("EDGEGLM_CUDA")
    assert isinstance(this_driver(), CtypesDriver)
    monkeypatch.setattr(cuda_driver, "_is_there", lambda _: True)
    if importlib.util.find_spec("pycuda") is None:
        with pytest.raises(UserError, match="EDGEGLM_CUDA=ctypes"):
            this_driver()
