"""The part of TensorRT's Python API that opens and runs plans, and how a plan is opened as it was built.

The Protocols name what edgeglm uses of it; ``tests/compile/trt_stubs_agree.py`` holds them against the
stubs of TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from edgeglm.engines.libraries import Library, broken


class Shape(Protocol):
    """``Dims``."""

    def __len__(self) -> int: ...
    def __getitem__(self, arg0: int, /) -> int: ...


class ExecutionContext(Protocol):
    """``IExecutionContext``."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...  # noqa: D102
    def set_device_memory(self, memory: int, size: int) -> None: ...  # noqa: D102
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...  # noqa: D102
    def set_tensor_address(self, name: str, memory: int) -> bool: ...  # noqa: D102
    def get_tensor_shape(self, name: str) -> Shape: ...  # noqa: D102
    def execute_async_v3(self, stream_handle: int) -> bool: ...  # noqa: D102


class Inspector(Protocol):
    """``IEngineInspector``."""

    def get_engine_information(self, format: Any) -> str: ...  # noqa: D102


class CudaEngine(Protocol):
    """``ICudaEngine``. The budget begins with TensorRT 10.1."""

    weight_streaming_budget_v2: int

    @property
    def num_optimization_profiles(self) -> int: ...  # noqa: D102
    @property
    def device_memory_size_v2(self) -> int: ...  # noqa: D102
    def get_weight_streaming_automatic_budget(self) -> int: ...  # noqa: D102
    def create_execution_context(self, strategy: Any) -> ExecutionContext | None: ...  # noqa: D102
    def create_engine_inspector(self) -> Inspector: ...  # noqa: D102


class RtxEngine(CudaEngine, Protocol):
    """``ICudaEngine`` of TensorRT-RTX."""

    def create_runtime_config(self) -> Any: ...  # noqa: D102


class Runtime(Protocol):
    """``IRuntime``."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None: ...  # noqa: D102


class RuntimeModule(Protocol):
    """The part of the module ``tensorrt`` (or ``tensorrt_rtx``) that opens plans."""

    @property
    def __version__(self) -> str: ...
    @property
    def Runtime(self) -> Callable[[Any], Runtime]: ...  # noqa: D102, N802
    @property
    def ExecutionContextAllocationStrategy(self) -> Any: ...  # noqa: D102, N802
    @property
    def LayerInformationFormat(self) -> Any: ...  # noqa: D102, N802


def opened_engine(
    module: RuntimeModule, logger: Any, plan: bytes, *, library: Library, options: Mapping[str, bool]
) -> tuple[Runtime, CudaEngine] | None:
    """Deserialise a plan; None where the library refuses it. The runtime must outlive the engine.

    Args:
        module: The imported library.
        logger: Its ILogger.
        plan: The raw plan, whose bytes somebody vouches for: one that is version-compatible holds code.
        library: Which library it is.
        options: The builder's flags that are set, as the plan's record has them. A version-compatible plan
            loads only where host code is allowed, and weights stay on the GPU until a budget is set.

    Raises:
        UserError: the library cannot start here.
    """
    try:
        runtime = module.Runtime(logger)
    except (RuntimeError, TypeError) as error:  # pybind's word for "the driver does not start"
        raise broken(library, error, "mend the driver") from error
    if options.get("version_compatible", False):
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    if options.get("weight_streaming", False) and hasattr(engine, "weight_streaming_budget_v2"):
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return runtime, engine
