"""The TensorRT backend, for plans of ``tensorrt`` and ``tensorrt_rtx`` alike.

A plan is never loaded when it is foreign: its record must name this library's exact version and this
GPU's compute capability, and its bytes must have the recorded digest. An engine has one stream and runs
one call at a time; a runner with several instances has as many streams. Each profile that calls need gets
a context, page-locked buffers and a CUDA graph of its own, made when it is first needed. The contexts
share the memory for activations, since no two of an engine's run at a time.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.cuda_driver import Driver, this_driver
from edgeglm.engines.libraries import imported_library
from edgeglm.engines.plan import PlanMetadata, TensorRecord
from edgeglm.engines.profiles import ProfileChoice, is_fixed, profile_of, whole_ranges
from edgeglm.engines.protocol import Array, Engine, Feeds, TensorSpec
from edgeglm.engines.tensorrt_bucket import Bucket
from edgeglm.engines.tensorrt_contexts import Contexts
from edgeglm.engines.trt_runtime import opened_engine


class TensorRtEngine(Engine):
    """One plan on GPU 0.

    Args:
        plan: The raw plan.
        metadata: The record beside it.
        name: What errors call it; the plan's path if None.
        graphs: Whether CUDA graphs are captured; calls answer the same without.
    """

    exact_shapes = True

    def __init__(
        self, plan: Path, metadata: PlanMetadata, *, name: str | None = None, graphs: bool = True
    ) -> None:
        self.path = plan
        self.metadata = metadata
        self.name = name or str(plan)
        self.graphs = graphs
        self._ranges = whole_ranges(metadata)
        self._choice = ProfileChoice(self._ranges, metadata.inputs, metadata.outputs)
        self._dtypes = {record.name: record.dtype for record in (*metadata.inputs, *metadata.outputs)}
        self._batched = [record.shape[:1] == (-1,) for record in metadata.outputs]
        self._resources = ExitStack()
        self._contexts: Contexts | None = None
        self._driver: Driver | None = None
        self._buckets: dict[int, Bucket] = {}
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the record says of the inputs."""
        return tuple(_spec(record) for record in self.metadata.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the record says of the outputs."""
        return tuple(_spec(record) for record in self.metadata.outputs)

    @property
    def bucket_batches(self) -> tuple[int, ...]:
        """The batch sizes that have contexts and graphs of their own."""
        return self._choice.bucket_batches

    @property
    def driver(self) -> Driver | None:
        """The CUDA driver while the engine is loaded."""
        return self._driver

    @property
    def in_use(self) -> dict[int, str]:
        """What became of each context that was needed: ``graph``, ``no graph yet``, or why there is none."""
        return {
            index: "graph" if bucket.captured else bucket.refusal or "no graph yet"
            for index, bucket in sorted(self._buckets.items())
        }

    def load(self) -> None:
        """Deserialise the plan. Raises UserError for a foreign or altered one."""
        if self._contexts is not None:
            return
        module = self._module()
        self._refuse_foreign(module.__version__)
        data = self.path.read_bytes()
        if sha256_bytes(data) != self.metadata.plan_sha256:
            raise UserError(f"{self.path} was altered or cut off; run 'edgeglm finalize' again")
        with ExitStack() as resources:
            driver = resources.enter_context(this_driver())
            with driver.bound():
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
                resources.callback(self._drop)
                self._contexts = Contexts(module, runtime, engine, driver, self.metadata)
                self._driver = driver
                if engine.num_optimization_profiles != max(1, len(self.metadata.profiles)):
                    raise UserError(f"{self.path} and its record disagree; run 'edgeglm finalize' again")
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Drop graphs and contexts and give the memory back."""
        with self._lock:
            self._resources.close()

    def _run(self, feeds: Feeds) -> list[Array]:
        with self._lock:
            if self._driver is None:
                raise UserError(f"{self.name} is not loaded; open it in a 'with' statement")
            given = {spec.name: feeds[spec.name] for spec in self.metadata.inputs}
            chosen = self._choice.of({name: array.shape for name, array in given.items()})
            if chosen is None:
                listed = ", ".join(f"{name} of shape {array.shape}" for name, array in given.items())
                raise UserError(
                    f"{self.name}: {listed} is outside the engine's profiles; feed a smaller batch"
                )
            index, shapes = chosen
            with self._driver.bound():
                outputs = self._bucket(index).run(given, shapes)
            rows = len(next(iter(given.values())))
            return [
                output[:rows] if batched and len(output) > rows else output
                for output, batched in zip(outputs, self._batched, strict=True)
            ]

    def _bucket(self, index: int) -> Bucket:
        bucket = self._buckets.get(index)
        if bucket is None:
            assert self._contexts is not None
            assert self._driver is not None
            fixed = is_fixed(self._ranges[index])
            context = self._contexts.made(fixed=fixed)
            if context is None:  # how TensorRT says that something does not fit
                raise EdgeglmError(
                    f"{self.metadata.library} has no memory to run {self.path}; end other programs on the GPU"
                )
            bucket = self._buckets[index] = Bucket(
                context,
                self._driver,
                profile_of(self.metadata, index),
                self._ranges[index],
                self.metadata.outputs,
                self._dtypes,
                refusal=self._no_graph(fixed),
            )
        return bucket

    def _no_graph(self, fixed: bool) -> str:
        """Return why calls of a profile are not captured; empty if they may be."""
        if not self.graphs:
            return "not asked for"
        if self.metadata.options.get("weight_streaming", False):
            return "weights are streamed"
        if not fixed and self.metadata.library == "tensorrt-rtx":  # a graph would keep the first kernels
            return "TensorRT-RTX improves the kernels of a range while it runs"
        return ""

    def _drop(self) -> None:
        """Let go in the order that TensorRT asks for: contexts, engine, runtime."""
        driver, contexts = self._driver, self._contexts
        self._driver = self._contexts = None
        if driver is not None:
            with driver.bound():
                for bucket in self._buckets.values():
                    bucket.close()
                self._buckets.clear()
                if contexts is not None:
                    contexts.close()

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
