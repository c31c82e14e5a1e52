"""No GPU is here: the library and the driver are stand-ins, the order of their calls is what is tested."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

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
    engine = SimpleNamespace(create_execution_context=Context)

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None: ...

    library = SimpleNamespace(
        __version__="10.3.0",
        Logger=Logger,
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine),
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


def test_an_absent_library_is_named(plan: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="tensorrt is not installed here"):
        module.TensorRtEngine(plan, RECORD).load()
