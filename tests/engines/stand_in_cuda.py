"""A stand-in for the CUDA driver, compiled, and one for TensorRT that runs on it; they keep the rules."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from ctypes import c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest

from edgeglm.engines import tensorrt_engine
from edgeglm.engines.cuda_devices import CudaDevice
from edgeglm.engines.plan import PlanMetadata

SOURCE = Path(__file__).with_name("stand_in_libcuda.c")


class StandIn:
    """The compiled stand-in: its counters by name, as ``stand_in.held``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.fake_double.argtypes = [c_void_p, c_uint64, c_uint64, c_size_t]

    def __getattr__(self, name: str) -> int:
        return c_int64.in_dll(self.library, f"fake_{name}").value

    def double(self, stream: int, to: int, source: int, size: int) -> bool:
        """Put a kernel that doubles ``size`` bytes of float32 into a stream."""
        return bool(self.library.fake_double(stream, to, source, size) == 0)

    def capturing(self, stream: int) -> bool:
        """Whether the stream is being captured."""
        return bool(self.library.capturing_now())

    def set(self, name: str, value: int) -> None:
        """Set a counter or a switch."""
        c_int64.in_dll(self.library, f"fake_{name}").value = value

    @property
    def given_back(self) -> bool:
        """Whether nothing of the driver is held any more, and nothing was freed twice."""
        return (self.held, self.blocks, self.streams, self.graphs, self.bad_frees) == (0, 0, 0, 0, 0)


def compiled_libcuda(folder: Path, compiler: str) -> Path:
    """Compile the stand-in, held against cuda.h where there is one; every warning is an error."""
    library = folder / "libcuda.so.1"
    headers = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    strict = ("-Wall", "-Wextra", "-Werror")
    flags = (*strict, "-shared", "-fPIC", "-pthread", f"-I{headers}", f"-Wl,-soname,{library.name}")
    sources = [str(SOURCE)]
    if names := _asked_by_pycuda():  # it is loaded only where all of the driver is there
        rest = folder / "rest.c"
        rest.write_text("".join(f"__attribute__((weak)) int {n}(void) {{ return 801; }}\n" for n in names))
        sources.append(str(rest))
    subprocess.run([compiler, *flags, "-o", str(library), *sources], check=True)
    return library


def _asked_by_pycuda() -> list[str]:
    """Return the driver's functions that pycuda is linked with, none where it is absent."""
    if importlib.util.find_spec("pycuda") is None:
        return []
    found = importlib.util.find_spec("pycuda._driver")
    assert found is not None
    assert found.origin is not None
    listed = subprocess.run(["nm", "-D", "--undefined-only", found.origin], capture_output=True, check=True)
    return re.findall(r" U (cu\w+)", listed.stdout.decode())


class StandInContext:
    """An IExecutionContext of one profile that doubles ``pixels`` into ``embedding``."""

    def __init__(self, engine: StandInEngine, *, managed: bool) -> None:
        self._managed = managed
        self._engine = engine
        self._profile: int | None = None
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self._ready = False  # the first call of a shape finishes what setting it began
        self._memory = (0, 0)
        self.calls = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self._engine.device_memory_size_v2
        self._memory = (memory, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if index in self._engine.profiles_taken and not self._engine.shares_profiles:
            return False
        self._engine.profiles_taken.append(index)
        self._profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "a profile first"
        covered = self._engine.profiles[self._profile][name]
        if not all(a <= b <= c for a, b, c in zip(covered.min, shape, covered.max, strict=True)):
            return False
        self._shape, self._ready = shape, False
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address > 0xFFFFFFFF, "64 bits of it"
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self._memory[0] or not self._managed, "its memory for activations is the user's to give"
        self.calls += 1
        if self._engine.stand_in.capturing(stream) and (not self._ready or self._engine.refuses_capture):
            return False
        self._ready = True
        size = 4
        for extent in self._shape:
            size *= extent
        taken = self._addresses["embedding"], self._addresses["pixels"]
        return self._engine.stand_in.double(stream, *taken, size)


class Kernels(Protocol):
    """What a stand-in for TensorRT computes with."""

    def double(self, stream: int, to: int, source: int, size: int) -> bool: ...
    def capturing(self, stream: int) -> bool: ...


class StandInEngine:
    """An ICudaEngine."""

    device_memory_size_v2 = 4096

    def __init__(self, stand_in: Kernels, profiles: tuple[Mapping[str, Any], ...]) -> None:
        self.stand_in, self.profiles = stand_in, profiles
        self.profiles_taken: list[int] = []
        self.contexts: list[StandInContext] = []
        self.full = self.refuses_capture = self.brings_code = self.shares_profiles = False
        self.weight_streaming_budget_v2 = 1000

    def get_weight_streaming_automatic_budget(self) -> int:
        return 400

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def create_execution_context(self, strategy: Any) -> StandInContext | None:
        if self.full:
            return None
        self.contexts.append(StandInContext(self, managed=strategy == "the user's"))
        return self.contexts[-1]


class StandInRuntime:
    """An IRuntime of one engine."""

    def __init__(self, engine: StandInEngine) -> None:
        self._engine = engine
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> StandInEngine | None:
        return None if self._engine.brings_code and not self.engine_host_code_allowed else self._engine


class _Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch, stand_in: Kernels, metadata: PlanMetadata) -> StandInEngine:
    """Put stand-ins in the places of ``tensorrt`` and of an Orin."""
    engine = StandInEngine(stand_in, metadata.profiles)
    library = SimpleNamespace(
        __version__=metadata.library_version,
        Logger=_Logger,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="the user's", STATIC="its own"),
        Runtime=lambda _: StandInRuntime(engine),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    device = CudaDevice(name="Orin", sm=87, memory_bytes=1)
    monkeypatch.setattr(tensorrt_engine, "cuda_devices", lambda: (device,))
    return engine
