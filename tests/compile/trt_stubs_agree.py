"""Read by mypy alone: what the Protocols say of TensorRT's Python API is what its stubs say.

``scripts/typing/tensorrt`` is cut from the published stubs of TensorRT 10.13. A name, an argument or a type
that edgeglm expects and the library has not is an error of ``scripts/check``.
"""

from __future__ import annotations

import tensorrt

from edgeglm.compile.trt_api import (
    Builder,
    BuilderConfig,
    Network,
    OptimizationProfile,
    Parser,
    ParserError,
    Tensor,
    TimingCache,
    TrtModule,
)
from edgeglm.engines.trt_runtime import CudaEngine, ExecutionContext, Inspector, Runtime, RuntimeModule

build_side: TrtModule = tensorrt
run_side: RuntimeModule = tensorrt

FLAGS = (
    tensorrt.BuilderFlag.REFIT,
    tensorrt.BuilderFlag.VERSION_COMPATIBLE,
    tensorrt.BuilderFlag.WEIGHT_STREAMING,
    tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS,
    tensorrt.LayerInformationFormat.JSON,
    tensorrt.MemoryPoolType.WORKSPACE,
    tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED,
    tensorrt.ProfilingVerbosity.DETAILED,
)


def _builder(one: tensorrt.Builder) -> Builder:
    return one


def _config(one: tensorrt.IBuilderConfig) -> BuilderConfig:
    return one


def _network(one: tensorrt.INetworkDefinition) -> Network:
    return one


def _tensor(one: tensorrt.ITensor) -> Tensor:
    return one


def _parser(one: tensorrt.OnnxParser) -> Parser:
    return one


def _complaint(one: tensorrt.ParserError) -> ParserError:
    return one


def _profile(one: tensorrt.IOptimizationProfile) -> OptimizationProfile:
    return one


def _cache(one: tensorrt.ITimingCache) -> TimingCache:
    return one


def _runtime(one: tensorrt.Runtime) -> Runtime:
    return one


def _engine(one: tensorrt.ICudaEngine) -> CudaEngine:
    return one


def _context(one: tensorrt.IExecutionContext) -> ExecutionContext:
    return one


def _inspector(one: tensorrt.EngineInspector) -> Inspector:
    return one


class _Log(tensorrt.ILogger):
    def log(self, severity: object, msg: str) -> None: ...


class _Monitor(tensorrt.IProgressMonitor):
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def phase_finish(self, phase_name: str) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        return True
