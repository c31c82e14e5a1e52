"""The one door to the TensorRT Python API, whichever of the two libraries serves it.

``tensorrt`` comes with JetPack or a GPU host; ``tensorrt_rtx`` (or ``tensorrt_rtx_bindings``, from
the split wheels) builds on any x86-64 host, with no GPU. Both have the same API; the Protocols here
name the part of it that edgeglm uses, so that the builder is type-checked without either, and
``tests/compile/trt_stubs_agree.py`` holds them against the stubs of TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from edgeglm.engines.libraries import Library, imported_library
from edgeglm.engines.trt_runtime import RuntimeModule

_REMEDIES: dict[Library, str] = {
    "tensorrt": "build on the device, where JetPack brings it",
    "tensorrt-rtx": "pip install 'edgeglm[build]' on an x86-64 host",
}


class Tensor(Protocol):
    """``ITensor``: one input or output of a network."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> Any: ...  # noqa: D102
    @property
    def shape(self) -> Any: ...  # noqa: D102


class Network(Protocol):
    """``INetworkDefinition``."""

    @property
    def num_inputs(self) -> int: ...  # noqa: D102
    @property
    def num_outputs(self) -> int: ...  # noqa: D102
    def get_input(self, index: int) -> Tensor: ...  # noqa: D102
    def get_output(self, index: int) -> Tensor: ...  # noqa: D102


class ParserError(Protocol):
    """``ParserError``: one complaint of the ONNX parser."""

    def desc(self) -> str: ...  # noqa: D102
    def node(self) -> int: ...  # noqa: D102
    def node_name(self) -> str: ...  # noqa: D102
    def node_operator(self) -> str: ...  # noqa: D102


class Parser(Protocol):
    """``OnnxParser``."""

    @property
    def num_errors(self) -> int: ...  # noqa: D102
    def parse_from_file(self, model: str) -> bool: ...  # noqa: D102
    def get_error(self, index: int) -> ParserError: ...  # noqa: D102


class OptimizationProfile(Protocol):
    """``IOptimizationProfile``. Its shapes are ``Dims``, which tuples become."""

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None: ...  # noqa: D102


class TimingCache(Protocol):
    """``ITimingCache``."""

    def serialize(self) -> Any: ...  # noqa: D102


class BuilderConfig(Protocol):
    """``IBuilderConfig``. What it takes back of what it made is Any: the library wants its own classes."""

    progress_monitor: Any
    profiling_verbosity: Any
    builder_optimization_level: int
    hardware_compatibility_level: Any

    def add_optimization_profile(self, profile: Any) -> int: ...  # noqa: D102
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...  # noqa: D102
    def set_flag(self, flag: Any) -> None: ...  # noqa: D102
    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None: ...  # noqa: D102
    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool: ...  # noqa: D102
    def get_timing_cache(self) -> TimingCache | None: ...  # noqa: D102


class RtxConfig(BuilderConfig, Protocol):
    """``IBuilderConfig`` of TensorRT-RTX, which builds for GPUs that are not here."""

    num_compute_capabilities: int

    def set_compute_capability(self, capability: Any, index: int) -> bool: ...  # noqa: D102


class Builder(Protocol):
    """``Builder``."""

    def create_network(self, flags: int) -> Network: ...  # noqa: D102
    def create_builder_config(self) -> BuilderConfig: ...  # noqa: D102
    def create_optimization_profile(self) -> OptimizationProfile: ...  # noqa: D102
    def build_serialized_network(self, network: Any, config: Any) -> Any: ...  # noqa: D102


class TrtModule(RuntimeModule, Protocol):
    """The part of the module ``tensorrt`` (or ``tensorrt_rtx``) that builds; its enums are Any."""

    @property
    def ILogger(self) -> Any: ...  # noqa: D102, N802
    @property
    def IProgressMonitor(self) -> Any: ...  # noqa: D102, N802
    @property
    def BuilderFlag(self) -> Any: ...  # noqa: D102, N802
    @property
    def MemoryPoolType(self) -> Any: ...  # noqa: D102, N802
    @property
    def ProfilingVerbosity(self) -> Any: ...  # noqa: D102, N802
    @property
    def NetworkDefinitionCreationFlag(self) -> Any: ...  # noqa: D102, N802
    @property
    def HardwareCompatibilityLevel(self) -> Any: ...  # noqa: D102, N802
    @property
    def Builder(self) -> Callable[[Any], Builder]: ...  # noqa: D102, N802
    @property
    def OnnxParser(self) -> Callable[[Any, Any], Parser]: ...  # noqa: D102, N802


class RtxModule(TrtModule, Protocol):
    """``tensorrt_rtx`` names the compute capabilities that it builds for."""

    @property
    def ComputeCapability(self) -> Any: ...  # noqa: D102, N802


@dataclass(frozen=True, kw_only=True)
class TrtApi:
    """A library that was imported."""

    library: Library
    module: TrtModule

    @property
    def version(self) -> str:
        """The exact version, such as ``"1.7.1.116"``."""
        return self.module.__version__

    @property
    def buildable_sms(self) -> tuple[int, ...]:
        """Compute capabilities it can build for without the GPU; none for native TensorRT."""
        if self.library != "tensorrt-rtx":
            return ()
        members: Mapping[str, Any] = cast(RtxModule, self.module).ComputeCapability.__members__
        return tuple(sorted(int(name[2:]) for name in members if name.startswith("SM")))


def load_trt(library: Library) -> TrtApi:
    """Import the library. Raises UserError when it is absent or broken."""
    module = imported_library(library, absent=_REMEDIES[library])
    return TrtApi(library=library, module=cast(TrtModule, module))
