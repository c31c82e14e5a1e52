"""The TensorRT backend, for plans of ``tensorrt`` and ``tensorrt_rtx`` alike.

A plan is never loaded when it is foreign: its record must name this library's exact version and this
GPU's compute capability, and its bytes must have the recorded digest. One context, one stream, one
call at a time; the asynchronous runner is another matter.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.cuda_memory import CudaMemory
from edgeglm.engines.libraries import imported_library
from edgeglm.engines.plan import PlanMetadata, TensorRecord
from edgeglm.engines.protocol import Array, Engine, Feeds, TensorSpec
from edgeglm.engines.trt_runtime import CudaEngine, ExecutionContext, Runtime, opened_engine


class TensorRtEngine(Engine):
    """One plan in one execution context.

    Args:
        plan: The raw plan.
        metadata: The record beside it.
        name: What errors call it; the plan's path if None.
    """

    def __init__(self, plan: Path, metadata: PlanMetadata, *, name: str | None = None) -> None:
        self.path = plan
        self.metadata = metadata
        self.name = name or str(plan)
        self._resources = ExitStack()
        self._memory: CudaMemory | None = None
        self._context: ExecutionContext | None = None
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the record says of the inputs."""
        return tuple(_spec(record) for record in self.metadata.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the record says of the outputs."""
        return tuple(_spec(record) for record in self.metadata.outputs)

    def load(self) -> None:
        """Deserialise the plan. Raises UserError for a foreign or altered one."""
        if self._context is not None:
            return
        module = self._module()
        self._refuse_foreign(module.__version__)
        data = self.path.read_bytes()
        if sha256_bytes(data) != self.metadata.plan_sha256:
            raise UserError(f"{self.path} was altered or cut off; run 'edgeglm finalize' again")
        with ExitStack() as resources:
            self._memory = resources.enter_context(CudaMemory())
            opened = opened_engine(
                module,
                module.Logger(module.Logger.ERROR),
                data,
                library=self.metadata.library,
                options=self.metadata.options,
            )
            if opened is None:
                raise EdgeglmError(
                    f"{self.metadata.library} cannot load {self.path}; run 'edgeglm finalize' again"
                )
            runtime, engine = opened
            self._context = engine.create_execution_context()
            if self._context is None:  # how TensorRT says that the activations do not fit
                raise EdgeglmError(
                    f"{self.metadata.library} has no memory to run {self.path}; end other programs on the GPU"
                )
            resources.callback(self._drop, engine, runtime)
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Drop the context and give the memory back."""
        self._resources.close()
        self._context = self._memory = None

    def _run(self, feeds: Feeds) -> list[Array]:
        if self._context is None or self._memory is None:
            raise UserError(f"{self.name} is not loaded; open it in a 'with' statement")
        with self._lock:
            self._memory.bind()
            return self._executed(feeds, self._context, self._memory)

    def _executed(self, feeds: Feeds, context: ExecutionContext, memory: CudaMemory) -> list[Array]:
        for name, array in feeds.items():
            if not context.set_input_shape(name, array.shape):
                raise UserError(
                    f"{self.name}: {name} of shape {array.shape} is outside the engine's profile; "
                    "feed a smaller batch"
                )
            context.set_tensor_address(name, memory.upload(name, array))
        results = []
        for spec in self.outputs:
            sizes = context.get_tensor_shape(spec.name)
            shape = tuple(sizes[axis] for axis in range(len(sizes)))
            result = np.empty(shape, dtype=spec.dtype)
            context.set_tensor_address(spec.name, memory.buffer(spec.name, max(1, result.nbytes)))
            results.append(result)
        if not context.execute_async_v3(memory.stream):
            raise EdgeglmError(f"{self.name} did not run; run 'edgeglm finalize' again")
        memory.synchronize()
        for spec, result in zip(self.outputs, results, strict=True):
            memory.download(spec.name, result)
        return results

    def _drop(self, engine: CudaEngine, runtime: Runtime) -> None:
        self._context = None
        del engine, runtime  # in this order, as TensorRT asks: context, engine, runtime

    def _refuse_foreign(self, version: str) -> None:
        if version != self.metadata.library_version:
            raise UserError(
                f"{self.path} was built by {self.metadata.library} {self.metadata.library_version}, here is "
                f"{version}; run 'edgeglm finalize' again"
            )
        sms = [device.sm for device in cuda_devices()[:1]]
        wide = self.metadata.options.get("hardware_compatible", False) and bool(sms) and sms[0] >= 80
        if not wide and (not sms or sms[0] not in self.metadata.sms):
            here = f"SM {sms[0]}" if sms else "no GPU"
            raise UserError(
                f"{self.path} was built for SM {', '.join(map(str, self.metadata.sms))}, here is {here}; "
                "run 'edgeglm finalize' on this machine"
            )

    def _module(self) -> Any:
        return imported_library(self.metadata.library, absent="finalize with ONNX Runtime")


def _spec(record: TensorRecord) -> TensorSpec:
    shape = tuple(None if size == -1 else size for size in record.shape)
    return TensorSpec(name=record.name, dtype=record.dtype, shape=shape)
