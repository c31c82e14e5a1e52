# Cut from tensorrt-stubs 10.13.0.35.1 by scripts/tensorrt-stub: edit that and not this file.
#
# MIT License
#
# Copyright (c) sync.dev
#
# Permission is hereby granted, free of charge, to any person obtaining a copy
# of this software and associated documentation files (the "Software"), to deal
# in the Software without restriction, including without limitation the rights
# to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
# copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all
# copies or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
# IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
# FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
# AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
# LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
# OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
# SOFTWARE.
import typing

__version__: str

class Builder:

    def __init__(self, logger: ILogger) -> None:
        ...

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory:
        ...

    def create_builder_config(self) -> IBuilderConfig:
        ...

    def create_network(self, flags: int=0) -> INetworkDefinition:
        ...

    def create_optimization_profile(self) -> IOptimizationProfile:
        ...

class BuilderFlag:
    REFIT: typing.ClassVar[BuilderFlag]
    VERSION_COMPATIBLE: typing.ClassVar[BuilderFlag]
    WEIGHT_STREAMING: typing.ClassVar[BuilderFlag]

class Dims:

    @typing.overload
    def __getitem__(self, arg0: int) -> int:
        ...

    @typing.overload
    def __getitem__(self, arg0: typing.Any) -> tuple:
        ...

    def __len__(self) -> int:
        ...

class EngineInspector:

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        ...

class ExecutionContextAllocationStrategy:
    STATIC: typing.ClassVar[ExecutionContextAllocationStrategy]
    USER_MANAGED: typing.ClassVar[ExecutionContextAllocationStrategy]

class HardwareCompatibilityLevel:
    AMPERE_PLUS: typing.ClassVar[HardwareCompatibilityLevel]

class IBuilderConfig:
    builder_optimization_level: int
    hardware_compatibility_level: HardwareCompatibilityLevel
    profiling_verbosity: ProfilingVerbosity
    progress_monitor: IProgressMonitor

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        ...

    def get_timing_cache(self) -> ITimingCache:
        ...

    def set_flag(self, flag: BuilderFlag) -> None:
        ...

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        ...

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        ...

class ICudaEngine:
    weight_streaming_budget_v2: int

    def create_engine_inspector(self) -> EngineInspector:
        ...

    @typing.overload
    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy=...) -> IExecutionContext:
        ...

    @typing.overload
    def create_execution_context(self, runtime_config: typing.Any=None) -> IExecutionContext:
        ...

    def get_weight_streaming_automatic_budget(self) -> int:
        ...

    @property
    def device_memory_size_v2(self) -> int:
        ...

    @property
    def num_optimization_profiles(self) -> int:
        ...

class IExecutionContext:

    def execute_async_v3(self, stream_handle: int) -> bool:
        ...

    def get_tensor_shape(self, name: str) -> Dims:
        ...

    def set_device_memory(self, memory: int, size: int) -> None:
        ...

    @typing.overload
    def set_input_shape(self, name: str, shape: tuple) -> bool:
        ...

    @typing.overload
    def set_input_shape(self, name: str, shape: list) -> bool:
        ...

    @typing.overload
    def set_input_shape(self, name: str, shape: Dims) -> bool:
        ...

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        ...

    def set_tensor_address(self, name: str, memory: int) -> bool:
        ...

class IHostMemory:

    @property
    def nbytes(self) -> int:
        ...

class ILogger:

    def __init__(self) -> None:
        ...

    def log(self, severity: typing.Any, msg: str) -> None:
        ...

class INetworkDefinition:

    def get_input(self, index: int) -> ITensor:
        ...

    def get_output(self, index: int) -> ITensor:
        ...

    @property
    def num_inputs(self) -> int:
        ...

    @property
    def num_outputs(self) -> int:
        ...

class IOptimizationProfile:

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        ...

class IProgressMonitor:

    def __init__(self) -> None:
        ...

    def phase_finish(self, phase_name: str) -> None:
        ...

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        ...

class ITensor:
    dtype: typing.Any
    name: str
    shape: Dims

class ITimingCache:

    def serialize(self) -> IHostMemory:
        ...

class LayerInformationFormat:
    JSON: typing.ClassVar[LayerInformationFormat]

class MemoryPoolType:
    WORKSPACE: typing.ClassVar[MemoryPoolType]

class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED: typing.ClassVar[NetworkDefinitionCreationFlag]

class OnnxParser:

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        ...

    def get_error(self, index: int) -> typing.Any:
        ...

    def parse_from_file(self, model: str) -> bool:
        ...

    @property
    def num_errors(self) -> int:
        ...

class ParserError:

    def desc(self) -> str:
        ...

    def node(self) -> int:
        ...

    def node_name(self) -> str:
        ...

    def node_operator(self) -> str:
        ...

class ProfilingVerbosity:
    DETAILED: typing.ClassVar[ProfilingVerbosity]

class Runtime:
    engine_host_code_allowed: bool

    def __init__(self, logger: ILogger) -> None:
        ...

    @typing.overload
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine:
        ...

    @typing.overload
    def deserialize_cuda_engine(self, stream_reader: typing.Any) -> ICudaEngine:
        ...

    @typing.overload
    def deserialize_cuda_engine(self, stream_reader_v2: typing.Any) -> ICudaEngine:
        ...
