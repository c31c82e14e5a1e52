"""The one door to the TensorRT Python API, whichever of the two libraries serves it.

``tensorrt`` comes with JetPack or a GPU host; ``tensorrt_rtx`` (or ``tensorrt_rtx_bindings``, from
the split wheels) builds on any x86-64 host, with no GPU. Both have the same API; the Protocols here
name the part of it that edgeglm uses, so that the builder is type-checked without either.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from edgeglm.core.errors import EdgeglmError, UserError

Library = Literal["tensorrt", "tensorrt-rtx"]

_MODULES: dict[Library, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_DISTRIBUTIONS: dict[Library, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
}
_REMEDIES: dict[Library, str] = {
    "tensorrt": "build on the device, where JetPack brings it",
    "tensorrt-rtx": "pip install 'edgeglm[build]' on an x86-64 host",
}


class Tensor(Protocol):
    """``ITensor``: one input or output of a network."""

    name: str
    dtype: Any
    shape: Any


class Network(Protocol):
    """``INetworkDefinition``."""

    num_inputs: int
    num_outputs: int

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

    num_errors: int

    def parse_from_file(self, path: str) -> bool: ...  # noqa: D102
    def get_error(self, index: int) -> ParserError: ...  # noqa: D102


class OptimizationProfile(Protocol):
    """``IOptimizationProfile``."""

    def set_shape(  # noqa: D102
        self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]
    ) -> None: ...


class TimingCache(Protocol):
    """``ITimingCache``."""

    def serialize(self) -> Any: ...  # noqa: D102


class BuilderConfig(Protocol):
    """``IBuilderConfig``. The compute capabilities are there in TensorRT-RTX only."""

    progress_monitor: Any
    profiling_verbosity: Any
    num_compute_capabilities: int
    builder_optimization_level: int
    hardware_compatibility_level: Any

    def set_compute_capability(self, capability: Any, index: int) -> bool: ...  # noqa: D102
    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...  # noqa: D102
    def set_memory_pool_limit(self, pool: Any, size: int) -> None: ...  # noqa: D102
    def set_flag(self, flag: Any) -> None: ...  # noqa: D102
    def create_timing_cache(self, blob: bytes) -> TimingCache | None: ...  # noqa: D102
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...  # noqa: D102
    def get_timing_cache(self) -> TimingCache | None: ...  # noqa: D102


class Builder(Protocol):
    """``Builder``."""

    def create_network(self, flags: int) -> Network: ...  # noqa: D102
    def create_builder_config(self) -> BuilderConfig: ...  # noqa: D102
    def create_optimization_profile(self) -> OptimizationProfile: ...  # noqa: D102
    def build_serialized_network(self, network: Network, config: BuilderConfig) -> Any: ...  # noqa: D102


class TrtModule(Protocol):
    """The part of the module ``tensorrt`` (or ``tensorrt_rtx``) that is used here."""

    __version__: str
    ILogger: Any
    IProgressMonitor: Any
    BuilderFlag: Any
    MemoryPoolType: Any
    ProfilingVerbosity: Any
    NetworkDefinitionCreationFlag: Any
    ComputeCapability: Any
    HardwareCompatibilityLevel: Any
    Builder: Callable[[Any], Builder]
    OnnxParser: Callable[[Network, Any], Parser]


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
        members: Mapping[str, Any] = self.module.ComputeCapability.__members__
        return tuple(sorted(int(name[2:]) for name in members if name.startswith("SM")))


def load_trt(library: Library) -> TrtApi:
    """Import the library. Raises UserError when it is absent, EdgeglmError when it is broken."""
    for name in _MODULES[library]:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            raise EdgeglmError(
                f"{library} is installed but broken: {error}; install it again, or {_REMEDIES[library]}"
            ) from error
        return TrtApi(library=library, module=cast(TrtModule, module))
    raise UserError(f"{library} is not installed; {_REMEDIES[library]}")


def installed_version(library: Library) -> str | None:
    """Return the version of an installed library without importing it; None if it is absent."""
    if all(importlib.util.find_spec(name) is None for name in _MODULES[library]):
        return None
    for distribution in _DISTRIBUTIONS[library]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"  # a system package, as on JetPack
