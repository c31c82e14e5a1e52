"""No GPU is here: the library and the driver are stand-ins, the order of their calls is what is tested."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeglm.compile.trt_api import load_trt
from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines import tensorrt_engine as module
from edgeglm.engines.cuda_devices import CudaDevice
from edgeglm.engines.plan import PlanMetadata, TensorRecord

RECORD = PlanMetadata(
    library="tensorrt",
    library_version="10.3.0",
    sms=(87,),
    onnx_sha256="a" * 64,
    plan_sha256=sha256_bytes(b"plan"),
    size_bytes=4,
    profiles=(),
    precision="fp16",
    inputs=(TensorRecord(name="pixels", dtype="float32", shape=(-1, 2)),),
    outputs=(TensorRecord(name="embedding", dtype="float32", shape=(-1, 2)),),
)


class Memory:
    """Device memory that is a dictionary, and a 'kernel' that doubles."""

    stream = 7

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}
        self.closed = False
        self.engine: Any = None
        self.runtime = SimpleNamespace(
            engine_host_code_allowed=False, deserialize_cuda_engine=lambda _: self.engine
        )

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def bind(self) -> None: ...

    def upload(self, name: str, array: Any) -> int:
        self.arrays[name] = array.copy()
        return 1

    def buffer(self, name: str, size: int) -> int:
        return 2

    def download(self, name: str, into: Any) -> None:
        into[:] = self.arrays["pixels"] * 2

    def synchronize(self) -> None: ...


class Context:
    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        return self.addresses.keys() == {"pixels", "embedding"}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    memory.engine = SimpleNamespace(
        create_execution_context=Context,
        weight_streaming_budget_v2=1000,
        get_weight_streaming_automatic_budget=lambda: 400,
    )

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None: ...

    library = SimpleNamespace(
        __version__="10.3.0",
        Logger=Logger,
        Runtime=lambda _: memory.runtime,
    )
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    orin = CudaDevice(name="Orin", sm=87, memory_bytes=1)
    monkeypatch.setattr(module, "cuda_devices", lambda: (orin,))
    monkeypatch.setattr(module, "CudaMemory", lambda: memory)
    return memory


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "engine.plan"
    path.write_bytes(b"plan")
    return path


def test_a_plan_runs_and_gives_its_memory_back(memory: Memory, plan: Path):
    pixels = np.ones((3, 2), np.float32)
    with module.TensorRtEngine(plan, RECORD) as engine:
        outputs = engine.infer({"pixels": pixels})
        assert outputs["embedding"].tolist() == (pixels * 2).tolist()
        with pytest.raises(UserError, match="outside the engine's profile"):
            engine.infer({"pixels": np.ones((5, 2), np.float32)})
    assert memory.closed
    with pytest.raises(UserError, match="is not loaded"):
        engine.infer({"pixels": pixels})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"library_version": "10.13.3"}, r"built by tensorrt 10\.13\.3, here is 10\.3\.0"),
        ({"sms": (110,)}, "built for SM 110, here is SM 87"),
        ({"plan_sha256": "b" * 64}, "was altered or cut off"),
    ],
)
def test_a_foreign_or_altered_plan_is_never_handed_to_the_library(change, words, memory: Memory, plan: Path):
    engine = module.TensorRtEngine(plan, msgspec.structs.replace(RECORD, **change))
    with pytest.raises(UserError, match=words):
        engine.load()


def test_an_engine_that_finds_no_memory_says_so_and_gives_back_what_it_took(
    memory: Memory, plan: Path, monkeypatch
):
    full = SimpleNamespace(create_execution_context=lambda: None)
    monkeypatch.setattr(
        sys.modules["tensorrt"], "Runtime", lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: full)
    )
    with pytest.raises(EdgeglmError, match=r"has no memory to run .*; end other programs on the GPU"):
        module.TensorRtEngine(plan, RECORD).load()
    assert memory.closed


def test_no_gpu_is_said_before_the_library_is_asked(memory: Memory, plan: Path, monkeypatch):
    monkeypatch.setattr(module, "cuda_devices", lambda: ())
    with pytest.raises(UserError, match="here is no GPU"):
        module.TensorRtEngine(plan, RECORD).load()


def test_a_version_compatible_plan_may_run_the_code_that_it_brings(memory: Memory, plan: Path):
    """TensorRT refuses such a plan otherwise, and its self-test would fail."""
    memory.runtime.deserialize_cuda_engine = lambda _: (
        memory.engine if memory.runtime.engine_host_code_allowed else None
    )
    with pytest.raises(EdgeglmError, match="cannot load"):
        module.TensorRtEngine(plan, RECORD).load()
    wide = msgspec.structs.replace(RECORD, options={"version_compatible": True})
    with module.TensorRtEngine(plan, wide) as engine:
        assert engine.infer({"pixels": np.ones((1, 2), np.float32)})["embedding"].tolist() == [[2.0, 2.0]]


def test_weights_are_streamed_only_where_that_was_asked_for(memory: Memory, plan: Path):
    module.TensorRtEngine(plan, RECORD).load()
    assert memory.engine.weight_streaming_budget_v2 == 1000, "all weights stay on the GPU"
    module.TensorRtEngine(plan, msgspec.structs.replace(RECORD, options={"weight_streaming": True})).load()
    assert memory.engine.weight_streaming_budget_v2 == 400


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
    body: str, words: str, memory: Memory, plan: Path, tmp_path: Path, monkeypatch
):
    (tmp_path / "packages/tensorrt").mkdir(parents=True)
    (tmp_path / "packages/tensorrt/__init__.py").write_text(f"{body}\n")
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    with pytest.raises(
        UserError, match=f"tensorrt is installed but broken: .*{words}.*; install it again, or"
    ):
        module.TensorRtEngine(plan, RECORD).load()
    with pytest.raises(
        UserError, match=f"tensorrt is installed but broken: .*{words}.*; install it again, or"
    ):
        load_trt("tensorrt")


def test_a_driver_that_does_not_start_is_said(memory: Memory, plan: Path, monkeypatch):
    def start(_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", start)
    with pytest.raises(UserError, match=r"installed but broken: pybind11.*mend the driver"):
        module.TensorRtEngine(plan, RECORD).load()
    assert memory.closed


def test_an_absent_library_is_named(plan: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="tensorrt is not installed here"):
        module.TensorRtEngine(plan, RECORD).load()
