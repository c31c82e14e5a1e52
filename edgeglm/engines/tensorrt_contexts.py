"""Execution contexts of one plan: how each is made, and the memory that they share."""

from __future__ import annotations

from typing import Any, cast

from edgeglm.engines.cuda_driver import Driver
from edgeglm.engines.plan import PlanMetadata
from edgeglm.engines.trt_runtime import CudaEngine, ExecutionContext, RtxEngine, Runtime, RuntimeModule


class Contexts:
    """Makes the execution contexts of one plan, which share one piece of memory for activations.

    With streamed weights each has memory of its own, which TensorRT-RTX then wants to take while it runs.
    The runtime and the engine live as long as this does.
    """

    def __init__(
        self,
        module: RuntimeModule,
        runtime: Runtime,
        engine: CudaEngine,
        driver: Driver,
        metadata: PlanMetadata,
    ) -> None:
        self._module, self._driver = module, driver
        self._runtime: Runtime | None = runtime
        self._engine: CudaEngine | None = engine
        self._activations: tuple[int, int] | None = None
        self._own_memory = metadata.options.get("weight_streaming", False)
        self._config: Any = None
        if metadata.library == "tensorrt-rtx":
            self._config = cast(RtxEngine, engine).create_runtime_config()
            # Kernels are compiled on the device; what one context compiled another need not.
            self._config.set_runtime_cache(self._config.create_runtime_cache())

    def made(self, *, fixed: bool) -> ExecutionContext | None:
        """Return a context, or None where the library finds no memory. ``fixed``: its shape is only one."""
        assert self._engine is not None
        strategies = self._module.ExecutionContextAllocationStrategy
        how: Any = strategies.STATIC if self._own_memory else strategies.USER_MANAGED
        if self._config is not None:
            kernels = cast(Any, self._module).DynamicShapesKernelSpecializationStrategy
            self._config.set_execution_context_allocation_strategy(how)
            self._config.dynamic_shapes_kernel_specialization_strategy = (
                kernels.EAGER if fixed else kernels.LAZY
            )
            how = self._config
        context = self._engine.create_execution_context(how)
        if context is not None and not self._own_memory:
            if self._activations is None:
                size = max(1, self._engine.device_memory_size_v2)
                self._activations = (self._driver.scratch(size), size)
            context.set_device_memory(*self._activations)
        return context

    def close(self) -> None:
        """Let go of the engine, then of the runtime, as TensorRT asks."""
        self._config = None
        self._engine = None
        self._runtime = None
