"""What times quantized files on the target's own GPU: engines really built, here run by ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from edgeglm.compile import clock as clocks
from edgeglm.compile.builder import EnginePlan
from edgeglm.compile.clock import GpuClock, gpu_clock
from edgeglm.compile.decision import Host
from edgeglm.compile.worker import BuildRequest, engine_built_apart
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import EdgeglmError
from edgeglm.core.progress import Progress, QuietProgress
from edgeglm.engines.cuda_devices import CudaDevice, cuda_devices
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.plan import PlanMetadata
from edgeglm.engines.protocol import Array, Engine, Feeds
from edgeglm.targets.schema import known_targets, load_target

Tower = Callable[..., Path]
FEEDS = tuple({"pixels": np.zeros((rows, 3, 4, 4), np.float32)} for rows in (1, 4))


class _Slowed(OnnxRuntimeEngine):
    """A model that takes this much longer: what a clock must see."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__(path, threads=1)
        self.seconds = seconds

    def _run(self, feeds: Feeds) -> list[Array]:
        time.sleep(self.seconds)
        return super()._run(feeds)


class Bench:
    """Builds by TensorRT-RTX and keeps the plans; runs each by ONNX Runtime, slower by a known time."""

    def __init__(self) -> None:
        self.requests: list[BuildRequest] = []
        self.seconds: dict[str, float] = {}
        self.files: dict[str, Path] = {}
        self.clock = GpuClock(
            member=load_target("t4"),
            library="tensorrt-rtx",
            version="1.7.1",
            progress=QuietProgress(),
            build=self.build,
            native=self.native,
        )

    def add(self, path: Path, seconds: float) -> Path:
        digest = sha256_file(path)
        self.seconds[digest], self.files[digest] = seconds, path
        return path

    def build(self, request: BuildRequest, progress: Progress) -> EnginePlan:
        self.requests.append(request)
        return engine_built_apart(request, progress)

    def native(self, plan: Path, metadata: PlanMetadata) -> Engine:
        assert sha256_file(plan) == metadata.plan_sha256
        digest = metadata.onnx_sha256
        return _Slowed(self.files[digest], self.seconds[digest])


@pytest.fixture
def bench() -> Bench:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX builds on x86-64 hosts only")
    return Bench()


def test_engines_are_built_for_the_shapes_that_are_timed_and_called_in_turn(
    bench: Bench, tmp_path: Path, image_tower: Tower
) -> None:
    reference = bench.add(image_tower(tmp_path / "fp16.onnx"), 0.012)
    quick = bench.add(image_tower(tmp_path / "quick.onnx", clip=True), 0.006)
    timed = bench.clock(reference, FEEDS)
    assert 1.5 < timed(quick) < 2.2
    assert [request.variant for request in bench.requests] == ["fp16", "quick"]
    for request in bench.requests:
        assert [profile["pixels"].opt for profile in request.profiles] == [(1, 3, 4, 4), (4, 3, 4, 4)]
        assert all(profile["pixels"].min == profile["pixels"].max for profile in request.profiles)
    again = timed(quick)
    assert len(bench.requests) == 2, "the same bytes are not built again"
    assert again == timed(quick)


def test_the_slowest_of_the_batches_decides(bench: Bench, tmp_path: Path, image_tower: Tower) -> None:
    """A file that gains on whole batches alone does not serve a device that gets one picture at a time."""

    class Uneven(_Slowed):
        def _run(self, feeds: Feeds) -> list[Array]:
            self.seconds = 0.012 if len(feeds["pixels"]) == 1 else 0.003
            return super()._run(feeds)

    reference = bench.add(image_tower(tmp_path / "fp16.onnx"), 0.012)
    uneven = bench.add(image_tower(tmp_path / "uneven.onnx", clip=True), 0.0)
    made = bench.native

    def native(plan: Path, metadata: PlanMetadata) -> Engine:
        return Uneven(uneven, 0) if metadata.onnx_sha256 == sha256_file(uneven) else made(plan, metadata)

    clock = GpuClock(
        member=bench.clock.member,
        library="tensorrt-rtx",
        version="1.7.1",
        progress=QuietProgress(),
        build=bench.build,
        native=native,
    )
    assert 0.8 < clock(reference, FEEDS)(uneven) < 1.2


def test_what_the_builder_refuses_is_an_error_with_its_words(
    bench: Bench, tmp_path: Path, image_tower: Tower
) -> None:
    reference = bench.add(image_tower(tmp_path / "fp16.onnx"), 0.0)
    odd = image_tower(tmp_path / "odd.onnx", unsupported=True)
    timed = bench.clock(reference, FEEDS)
    with pytest.raises(EdgeglmError, match="odd_one"):
        timed(odd)


@pytest.mark.parametrize(
    ("target", "sm", "host", "library"),
    [
        ("t4", 75, Host(tensorrt=None, tensorrt_rtx="1.7.1", sms=(75,)), "tensorrt-rtx"),
        ("h100", 90, Host(tensorrt="10.13.0", tensorrt_rtx=None, sms=(90,)), "tensorrt"),
        ("h100", 90, Host(tensorrt=None, tensorrt_rtx="1.7.1", sms=(90,)), None),  # nobody builds for it
        ("t4", 89, Host(tensorrt=None, tensorrt_rtx="1.7.1", sms=(89,)), None),  # another GPU
        ("t4", None, Host(tensorrt=None, tensorrt_rtx="1.7.1", sms=()), None),  # it builds and cannot run
        ("jetson-agx-xavier", 72, Host(tensorrt="8.5.2", tensorrt_rtx=None, sms=(72,)), None),  # lane A
        ("cpu", 89, Host(tensorrt="10.13.0", tensorrt_rtx=None, sms=(89,)), None),
    ],
)
def test_only_the_targets_own_gpu_is_a_clock(
    target: str, sm: int | None, host: Host, library: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = () if sm is None else (CudaDevice(name="GPU 0", sm=sm, memory_bytes=16 << 30),)
    monkeypatch.setattr(clocks, "cuda_devices", lambda: here)
    found = gpu_clock(load_target(target), host=host)
    assert (None if found is None else found.library) == library
    if found is not None:
        assert target in found.words
        assert found.library in found.words


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "rows"), [(16, (1, 8)), (512, (8,))])
def test_on_a_gpu_a_file_is_as_fast_as_itself(
    tmp_path: Path, image_tower: Tower, side: int, rows: tuple[int, ...]
) -> None:
    if not cuda_devices():
        pytest.skip("no GPU is here")
    profiles = [load_target(name) for name in known_targets()]
    here = [profile for profile in profiles if profile.sm == cuda_devices()[0].sm]
    found = gpu_clock(here[0]) if here else None
    if found is None:
        pytest.skip("no TensorRT builds for this GPU here")
    tower = image_tower(tmp_path / "image.onnx", side=side)
    feeds = [{"pixels": np.zeros((count, 3, side, side), np.float32)} for count in rows]
    assert 0.7 < found(tower, feeds)(tower) < 1.4
