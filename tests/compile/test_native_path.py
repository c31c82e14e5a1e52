"""Native TensorRT is absent on a laptop; its path through the builder is walked with a stand-in module."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeglm.compile import builder as builder_module
from edgeglm.compile.builder import engine_from_onnx
from edgeglm.compile.layers import layer_table
from edgeglm.compile.trt_api import TrtApi
from edgeglm.core.errors import UserError
from edgeglm.engines.cuda_devices import CudaDevice
from edgeglm.engines.plan import ShapeRange
from edgeglm.targets.build_options import BuildOptions
from edgeglm.targets.schema import load_target

IMAGES = {"pixels": ShapeRange(min=(1, -1), opt=(2, -1), max=(4, -1))}


class Flag(Enum):
    VERSION_COMPATIBLE = 1


class Cache:
    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def serialize(self) -> bytes:
        return self.blob + b"+timed"


class Config:
    """An ``IBuilderConfig`` without compute capabilities, as native TensorRT's is."""

    def __init__(self) -> None:
        self.flags: list[Flag] = []
        self.cache: Cache | None = None
        self.profiling_verbosity = "layer names only"
        self.hardware_compatibility_level: str | None = None

    def add_optimization_profile(self, profile: Any) -> int:
        return 0

    def set_flag(self, flag: Flag) -> None:
        self.flags.append(flag)

    def create_timing_cache(self, blob: bytes) -> Cache | None:
        return None if blob == b"of another version" else Cache(blob)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        if cache.blob == b"of another GPU":
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


class Logger:
    def __init__(self) -> None: ...


def native_module(config: Config) -> Any:
    pixels = SimpleNamespace(name="pixels", dtype="DataType.FLOAT", shape=(-1, 3))
    embedding = SimpleNamespace(name="embedding", dtype="DataType.HALF", shape=(-1, 8))
    network = SimpleNamespace(
        num_inputs=1, num_outputs=1, get_input=lambda _: pixels, get_output=lambda _: embedding
    )
    builder = SimpleNamespace(
        create_network=lambda _: network,
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *_: None),
        build_serialized_network=lambda *_: b"plan",
    )
    return SimpleNamespace(
        __version__="10.13.3",
        ILogger=Logger,
        BuilderFlag=Flag,
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere+"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        Builder=lambda _: builder,
        OnnxParser=lambda *_: SimpleNamespace(parse_from_file=lambda _: True),
    )


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    config = Config()
    api = TrtApi(library="tensorrt", module=native_module(config))
    monkeypatch.setattr(builder_module, "load_trt", lambda _: api)
    monkeypatch.setattr("edgeglm.compile.trt_callbacks._loggers", {})
    thor = CudaDevice(name="Thor", sm=110, memory_bytes=128 << 30)
    monkeypatch.setattr(builder_module, "cuda_devices", lambda: (thor,))
    return config


def build(folder: Path, *names: str, **changes: Any) -> Any:
    (folder / "image.onnx").write_bytes(b"onnx")
    return engine_from_onnx(
        folder / "image.onnx",
        targets=[load_target(name) for name in names],
        library="tensorrt",
        precision="fp16",
        profiles=[IMAGES],
        **changes,
    )


def test_a_board_builds_for_its_own_sm_and_keeps_the_timing_cache(config: Config, tmp_path: Path) -> None:
    engine = build(
        tmp_path, "jetson-agx-thor", timing_cache=b"old", options=BuildOptions(version_compatible=True)
    )
    assert (engine.plan, engine.timing_cache) == (b"plan", b"old+timed")
    assert engine.metadata.sms == (110,)
    assert engine.metadata.outputs[0].dtype == "float16"
    assert config.flags == [Flag.VERSION_COMPATIBLE]
    assert config.hardware_compatibility_level is None, "not asked for"
    assert config.profiling_verbosity == "detailed", "without it the layer table says no types"


def test_a_plan_for_ampere_and_newer_is_built_on_a_server_and_refused_on_a_jetson(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = BuildOptions(hardware_compatible=True)
    with pytest.raises(UserError, match="jetson-agx-thor: TensorRT has no hardware compatibility on JetPack"):
        build(tmp_path, "jetson-agx-thor", options=wide)
    h100 = CudaDevice(name="H100", sm=90, memory_bytes=80 << 30)
    monkeypatch.setattr(builder_module, "cuda_devices", lambda: (h100,))
    engine = build(tmp_path, "h100", options=wide)
    assert config.hardware_compatibility_level == "ampere+"
    assert (config.flags, engine.metadata.options) == ([], {"hardware_compatible": True})


@pytest.mark.parametrize("blob", [b"of another version", b"of another GPU"])
def test_a_foreign_timing_cache_is_started_afresh(blob: bytes, config: Config, tmp_path: Path) -> None:
    assert build(tmp_path, "jetson-agx-thor", timing_cache=blob).timing_cache == b"+timed"


def test_a_board_does_not_build_for_another(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot build for jetson-agx-orin-64gb .*only for SM 110"):
        build(tmp_path, "jetson-agx-orin-64gb")
    with pytest.raises(UserError, match="one SM at a time"):
        build(tmp_path, "jetson-agx-orin-64gb", "jetson-agx-thor")


def test_tensorrt_8_is_told_to_take_lane_a(config: Config, tmp_path: Path) -> None:
    module = native_module(config)
    module.NetworkDefinitionCreationFlag = SimpleNamespace()
    api = TrtApi(library="tensorrt", module=module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder_module, "load_trt", lambda _: api)
        with pytest.raises(UserError, match="lane A"):
            build(tmp_path, "jetson-agx-thor")


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA initialization failure with error: 35"), TypeError("null")]
)
def test_a_tensorrt_that_cannot_start_is_said_and_not_a_crash(
    error: Exception, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: object) -> None:
        raise error

    module = native_module(config)
    module.Builder = start
    api = TrtApi(library="tensorrt", module=module)
    monkeypatch.setattr(builder_module, "load_trt", lambda _: api)
    with pytest.raises(UserError, match=f"tensorrt is installed but broken: {error}; .*mend the driver"):
        build(tmp_path, "jetson-agx-thor")


def test_the_layers_of_a_version_compatible_plan_are_listed_too(tmp_path: Path) -> None:
    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, _: object) -> None: ...

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            inspector = SimpleNamespace(get_engine_information=lambda _: "[]")
            engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
            return engine if self.engine_host_code_allowed else None

    module = SimpleNamespace(
        __version__="10", Runtime=Runtime, LayerInformationFormat=SimpleNamespace(JSON="json")
    )
    wide = {"version_compatible": True}
    assert layer_table(module, None, b"plan", library="tensorrt", options=wide) == "[]"
    assert layer_table(module, None, b"plan", library="tensorrt", options={}) is None
