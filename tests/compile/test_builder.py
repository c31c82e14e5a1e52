"""Real engines, built here without a GPU, and clear words where none can be built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX builds on x86-64 hosts only")

from edgeglm.compile.builder import EnginePlan, engine_from_onnx
from edgeglm.compile.trt_api import load_trt
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.progress import Task
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.libraries import installed_version
from edgeglm.engines.plan import PlanMetadata, ShapeRange, plan_metadata_from_file
from edgeglm.targets.build_options import BuildOptions
from edgeglm.targets.schema import Target, load_target

Tower = Callable[..., Path]
IMAGES = {"pixels": ShapeRange(min=(1, -1, -1, -1), opt=(4, -1, -1, -1), max=(8, -1, -1, -1))}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, image_tower: Tower) -> Path:
    return image_tower(tmp_path_factory.mktemp("half") / "image.onnx")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, image_tower: Tower) -> Path:
    return image_tower(tmp_path_factory.mktemp("full") / "image.onnx", half=False)


def build(path: Path, *names: str, precision: str = "fp16", **changes) -> EnginePlan:
    targets: list[Target] = changes.pop("targets", None) or [load_target(name) for name in names]
    return engine_from_onnx(
        path,
        targets=targets,
        library=changes.pop("library", "tensorrt-rtx"),
        precision=precision,
        profiles=changes.pop("profiles", [IMAGES]),
        **changes,
    )


@pytest.mark.parametrize(
    ("target", "sm"), [("t4", 75), ("a100", 80), ("a10", 86), ("l4", 89), ("rtx-pro-6000", 120)]
)
def test_an_engine_is_built_for_each_gpu_without_having_it(half: Path, target: str, sm: int) -> None:
    engine = build(half, target)
    assert engine.metadata.sms == (sm,)
    assert engine.metadata.size_bytes == len(engine.plan) > 10_000
    assert engine.metadata.plan_sha256 == sha256_bytes(engine.plan)


def test_a_users_own_gpu_of_sm_121_is_served(half: Path) -> None:
    spark = msgspec.structs.replace(load_target("rtx-pro-6000"), name="my-spark", sm=121)
    assert build(half, targets=[spark]).metadata.sms == (121,)


def test_one_engine_serves_several_gpus(half: Path) -> None:
    engine = build(half, "t4", "a10", "l4", "l40s", "rtx-pro-6000")
    assert engine.metadata.sms == (75, 86, 89, 120)


def test_the_record_beside_the_plan_says_what_it_was_made_from(half: Path, tmp_path: Path) -> None:
    engine = build(half, "l4", variant="fp16", tower="image")
    plan, record = engine.write(tmp_path, "fp16-image-sm89")
    assert plan.read_bytes() == engine.plan, "the plan is raw: any other tool can load it"
    metadata: PlanMetadata = plan_metadata_from_file(record)
    assert metadata == engine.metadata
    assert metadata.onnx_sha256 == sha256_file(half)
    assert metadata.library_version == load_trt("tensorrt-rtx").version
    assert metadata.profiles[0]["pixels"].max == (8, 3, 4, 4)
    assert [(t.name, t.dtype, t.shape) for t in metadata.inputs] == [("pixels", "float32", (-1, 3, 4, 4))]
    assert [t.name for t in metadata.outputs] == ["embedding"]
    assert any("opset" in line.lower() for line in engine.log)
    assert plan.with_suffix(".log").read_text().splitlines() == [
        line for entry in engine.log for line in entry.splitlines()
    ]


def test_a_text_tower_with_two_dynamic_dimensions_is_built(tmp_path: Path, text_tower: Tower) -> None:
    tokens = ShapeRange(min=(1, 1), opt=(8, 16), max=(32, 32))
    engine = build(
        text_tower(tmp_path / "text.onnx"),
        "t4",
        profiles=[{"input_ids": tokens, "attention_mask": tokens}],
    )
    assert {tensor.dtype for tensor in engine.metadata.inputs} == {"int64"}


def test_fp32_on_a_t4_is_refused_before_anything_is_built(full: Path) -> None:
    with pytest.raises(UserError, match=r"FP32 GEMM on SM 7\.5.*use fp16"):
        build(full, "t4", precision="fp32")
    assert build(full, "l4", precision="fp32").metadata.precision == "fp32"


def test_the_builders_own_words_are_shown_with_the_node(full: Path) -> None:
    """A graph that is not what its variant claims gets past legality and is stopped by the builder."""
    with pytest.raises(EdgeglmError, match=r"proj.*FP32 GEMM is not supported"):
        build(full, "t4", precision="fp16")


def test_after_a_failed_build_the_next_one_keeps_its_own_log(full: Path, half: Path) -> None:
    with pytest.raises(EdgeglmError) as caught:
        build(full, "t4")
    engine = build(half, "t4")
    assert engine.log
    assert not any("not supported" in line for line in engine.log)
    assert "FP32 GEMM" in str(caught.value)


def test_a_node_that_the_parser_refuses_is_named(tmp_path: Path, image_tower: Tower) -> None:
    odd = image_tower(tmp_path / "odd.onnx", unsupported=True)
    with pytest.raises(EdgeglmError, match=r"odd_one.*StringNormalizer"):
        build(odd, "l4")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07\x12\x00" * 40])
def test_a_broken_file_is_an_error_and_not_a_crash(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(EdgeglmError, match=r"broken\.onnx"):
        build(tmp_path / "broken.onnx", "l4")


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (None, "give an optimization profile"),
        ({}, "pixels is dynamic"),
        ({"image": IMAGES["pixels"]}, "no input is named 'image'; its inputs are pixels"),
        ({"pixels": ShapeRange(min=(1, -1), opt=(1, -1), max=(1, -1))}, "give it 4 dimensions"),
        (
            {"pixels": ShapeRange(min=(4, -1, -1, -1), opt=(2, -1, -1, -1), max=(8, -1, -1, -1))},
            "min <= opt <= max",
        ),
        ({"pixels": ShapeRange(min=(-1,) * 4, opt=(-1,) * 4, max=(-1,) * 4)}, "give it a size"),
        (
            {"pixels": ShapeRange(min=(1, 3, 9, 4), opt=(1, 3, 9, 4), max=(1, 3, 9, 4))},
            "asks for 9 where the graph has 4",
        ),
    ],
)
def test_a_profile_that_does_not_fit_the_graph_says_where(
    half: Path, profile: dict[str, ShapeRange] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(half, "l4", profiles=[] if profile is None else [profile])


def test_a_target_or_library_that_cannot_build_here_is_told_where_it_can(half: Path) -> None:
    with pytest.raises(UserError, match=r"cannot build for h100 .*only for SM 75, 80"):
        build(half, "h100")
    with pytest.raises(UserError, match="at least one device"):
        build(half)
    with pytest.raises(UserError, match="no ONNX file at"):
        build(half.with_name("none.onnx"), "l4")


def test_native_tensorrt_absent_is_a_user_error_with_the_place_that_has_it(half: Path) -> None:
    if installed_version("tensorrt") is not None:
        pytest.skip("native TensorRT is installed here")
    with pytest.raises(UserError, match="JetPack"):
        build(half, "h100", library="tensorrt")


def test_options_reach_the_builder(half: Path) -> None:
    options = BuildOptions(weight_streaming=True, workspace_bytes=64 << 20, optimization_level=0)
    assert build(half, "l4", options=options).metadata.options == {"weight_streaming": True}


def test_options_that_the_library_cannot_serve_are_refused_in_plain_words(half: Path) -> None:
    with pytest.raises(UserError, match="leave version_compatible out"):
        build(half, "l4", options=BuildOptions(version_compatible=True))
    with pytest.raises(UserError, match=r"l4: TensorRT-RTX overhears hardware_compatible.*several targets"):
        build(half, "l4", options=BuildOptions(hardware_compatible=True))
    if not cuda_devices():
        with pytest.raises(UserError, match="leave refit out"):
            build(half, "l4", options=BuildOptions(refit=True))


def test_a_timing_cache_of_nonsense_does_no_harm(half: Path) -> None:
    engine = build(half, "l4", timing_cache=b"nonsense")
    assert engine.plan
    assert engine.timing_cache is None, "TensorRT-RTX times nothing"


class Watched:
    """A progress that keeps what it is told, and can raise as Ctrl-C would."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.steps = 0
        self.notes: list[str] = []
        self._interrupt_at = interrupt_at

    def advance(self, steps: float = 1) -> None:
        self.steps += 1

    def note(self, text: str) -> None:
        self.notes.append(text)
        if len(self.notes) == self._interrupt_at:
            raise KeyboardInterrupt

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        yield self


def test_the_builders_phases_are_shown(half: Path) -> None:
    progress = Watched()
    build(half, "l4", progress=progress)
    assert progress.steps >= 5
    assert any("graph" in note.lower() for note in progress.notes)


def test_ctrl_c_stops_a_build_and_is_not_lost_in_it(half: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(half, "l4", progress=Watched(interrupt_at=2))
    assert build(half, "l4").plan
