"""Every member of a target is accounted for: built, deferred with the reason, or plain ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("onnx")

from edgeglm.compile.builder import EnginePlan, engine_from_onnx
from edgeglm.compile.contract import precision_of, tower_profile, variants_of
from edgeglm.compile.decision import Host, MemberPlan, plan_compile, require_options, this_host
from edgeglm.compile.stage import CompileStage, compile_config, compile_record_from_file
from edgeglm.compile.worker import BuildRequest
from edgeglm.core.artifact import Artifact, listing_of
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.progress import Progress, QuietProgress
from edgeglm.core.recipe import EngineConfig
from edgeglm.core.stage import Context
from edgeglm.core.store import Store
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.plan import PlanMetadata, plan_metadata_from_file
from edgeglm.targets.schema import load_target, resolve_target

BARE = Host(tensorrt=None, tensorrt_rtx=None, sms=())
LAPTOP = Host(tensorrt=None, tensorrt_rtx="1.7.1.116", sms=())
RTX = pytest.mark.skipif(
    plan_compile(load_target("t4"))[0].status != "build", reason="TensorRT-RTX is not installed here"
)


def decided(name: str, host: Host) -> dict[str, MemberPlan]:
    return {plan.member.name: plan for plan in plan_compile(load_target(name), host=host)}


@pytest.mark.parametrize("name", ["t4", "a10", "a100", "l4", "l40s", "rtx-pro-6000"])
def test_rtx_targets_are_built_on_a_laptop_and_deferred_on_a_bare_one(name: str) -> None:
    assert decided(name, LAPTOP)[name].status == "build"
    bare = decided(name, BARE)[name]
    assert bare.status == "deferred"
    assert "pip install" in bare.reason


@pytest.mark.parametrize(("name", "sm"), [("h100", 90), ("h200", 90), ("b200", 100), ("jetson-orin-nx", 87)])
def test_native_targets_are_built_only_where_tensorrt_and_the_sm_match(name: str, sm: int) -> None:
    assert decided(name, LAPTOP)[name].status == "deferred"
    assert "finalize" in decided(name, LAPTOP)[name].reason
    assert decided(name, Host(tensorrt="10.13.3", tensorrt_rtx=None, sms=(sm,)))[name].status == "build"
    other = decided(name, Host(tensorrt="10.13.3", tensorrt_rtx=None, sms=(89,)))[name]
    assert other.status == "deferred"
    assert "SM 8.9" in other.reason


def test_the_jetson_family_is_deferred_member_by_member() -> None:
    plans = decided("jetson-agx", LAPTOP)
    assert {plan.status for plan in plans.values()} == {"deferred"}
    assert "lane A" in plans["jetson-agx-xavier"].reason
    assert "lane" not in plans["jetson-agx-orin-64gb"].reason


def test_the_cpu_needs_no_engine() -> None:
    assert decided("cpu", LAPTOP)["cpu"].status == "onnxruntime"


def test_a_resolved_target_is_decided_without_its_profiles() -> None:
    plans = plan_compile(resolve_target(load_target("jetson-agx")), host=LAPTOP)
    assert [plan.member.name for plan in plans] == list(load_target("jetson-agx").members)


Models = Callable[..., Artifact]


@pytest.fixture
def models(image_tower: Callable[..., Path], text_tower: Callable[..., Path]) -> Models:
    """Make quantize artifacts; each variant is named with whether its graph is really FP16."""

    def made(folder: Path, **variants: bool) -> Artifact:
        for variant, half in variants.items():
            image_tower(folder / "models" / variant / "image.onnx", half=half)
            text_tower(folder / "models" / variant / "text.onnx", half=half)
        (folder / "variants.json").write_text("{}")
        return Artifact(kind="quantize", path=folder, files=listing_of(folder))

    return made


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(store=Store(tmp_path / "store"), progress=QuietProgress(), threads=1)


@RTX
def test_a_t4_bundle_gets_real_engines_and_a_second_run_reuses_them(
    tmp_path: Path, context: Context, models: Models
) -> None:
    import onnx

    models(tmp_path / "q", fp32=False, fp16=True, int8=True)
    image = onnx.load(str(tmp_path / "q/models/int8/image.onnx"))
    image.doc_string = "INT8, as it were"
    onnx.save(image, str(tmp_path / "q/models/int8/image.onnx"))
    listed = Artifact(kind="quantize", path=tmp_path / "q", files=listing_of(tmp_path / "q"))
    inputs = {"quantize": listed}
    stage = CompileStage(compile_config(load_target("t4"), max_length=24))
    result = stage(inputs, context)
    record = compile_record_from_file(result.artifact.file("compile.json"))
    (member,) = record.members
    assert member.status == "built"
    assert member.library == "tensorrt-rtx"
    assert [(engine.variant, engine.tower) for engine in member.engines] == [
        (variant, tower) for variant in ("fp16", "int8") for tower in ("image", "text")
    ]
    files = [engine.file for engine in member.engines]
    assert files == [
        f"engines/{variant}-{tower}-sm75.plan"
        for variant, tower in (("fp16", "image"), ("fp16", "text"), ("int8", "image"), ("fp16", "text"))
    ], "the text tower is one file in both variants and is built once"
    assert result.artifact.provenance["measured"]["engines"] == 3
    assert result.artifact.provenance["measured"]["compute_capabilities"] == ["7.5"]
    assert result.artifact.provenance["key"]["libraries"] == {"tensorrt-rtx": member.library_version}
    for file in files:
        assert file is not None
        metadata = plan_metadata_from_file(result.artifact.file(file.replace(".plan", ".json")))
        assert metadata.sms == (75,)
    text = plan_metadata_from_file(result.artifact.file("engines/fp16-text-sm75.json"))
    assert text.profiles[0]["input_ids"].max == (32, 24)
    assert stage(inputs, context).reused


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build without a child: quicker, where the child is not what is tested."""

    def built(request: BuildRequest, progress: Progress) -> EnginePlan:
        return engine_from_onnx(
            Path(request.onnx_path),
            targets=request.targets,
            library=request.library,
            precision=request.precision,
            profiles=request.profiles,
            options=request.options,
            progress=progress,
            variant=request.variant,
            tower=request.tower,
        )

    monkeypatch.setattr("edgeglm.compile.stage.engine_built_apart", built)


@RTX
@pytest.mark.usefixtures("in_process")
def test_an_int8_failure_is_recorded_with_the_builders_words_and_an_fp16_failure_stops_the_build(
    tmp_path: Path, context: Context, models: Models
) -> None:
    stage = CompileStage(compile_config(load_target("t4")))
    wrong_int8 = {"quantize": models(tmp_path / "a", fp16=True, int8=False)}
    record = compile_record_from_file(stage(wrong_int8, context).artifact.file("compile.json"))
    (member,) = record.members
    assert member.status == "built"
    assert [engine.variant for engine in member.engines if engine.file] == ["fp16", "fp16"]
    assert all("FP32 GEMM" in (engine.failure or "") for engine in member.engines if not engine.file)
    with pytest.raises(EdgeglmError, match="FP32 GEMM"):
        stage({"quantize": models(tmp_path / "b", fp16=False)}, context)
    only_int8 = {"quantize": models(tmp_path / "c", int8=False)}
    record = compile_record_from_file(stage(only_int8, context).artifact.file("compile.json"))
    assert record.members[0].status == "deferred"
    assert "no engine could be built here" in record.members[0].reason


def test_a_host_with_the_gpu_keeps_the_builders_log_and_times_no_tactic_twice(
    tmp_path: Path, context: Context, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bytes | None] = []

    def built(request: BuildRequest, progress: Progress) -> EnginePlan:
        given.append(Path(request.timing_cache).read_bytes() if request.timing_cache else None)
        plan = request.tower.encode()
        metadata = PlanMetadata(
            library="tensorrt",
            library_version="10.13.3",
            sms=(90,),
            onnx_sha256=sha256_file(Path(request.onnx_path)),
            plan_sha256=sha256_bytes(plan),
            size_bytes=len(plan),
            profiles=request.profiles,
            precision=request.precision,
            inputs=(),
            outputs=(),
        )
        timed = (given[-1] or b"") + b"timed "
        return EnginePlan(plan=plan, metadata=metadata, log=("[info] x",), timing_cache=timed, layers="[]")

    here = Host(tensorrt="10.13.3", tensorrt_rtx=None, sms=(90,))
    monkeypatch.setattr("edgeglm.compile.decision.this_host", lambda: here)
    monkeypatch.setattr("edgeglm.compile.stage.engine_built_apart", built)
    monkeypatch.setattr("edgeglm.compile.stage.driver_version", lambda: "580.95.05")
    inputs = {"quantize": models(tmp_path / "q", fp16=True)}
    artifact = CompileStage(compile_config(load_target("h100")))(inputs, context).artifact
    # A plan that loads nowhere is explained by these, and nothing else of the bundle knows them all.
    assert artifact.provenance["key"]["libraries"] == {"tensorrt": "10.13.3"}
    assert artifact.provenance["measured"]["compute_capabilities"] == ["9.0"]
    assert artifact.provenance["measured"]["driver"] == "580.95.05"
    assert artifact.file("engines/fp16-text-sm90.log").read_text() == "[info] x\n"
    assert artifact.file("engines/fp16-text-sm90.layers.json").read_text() == "[]"
    other = CompileStage(compile_config(load_target("h100"), max_length=24))  # another key, the same graphs
    other(inputs, context)
    assert given == [None, None, b"timed ", b"timed "]
    assert not any(name.endswith(".cache") for name in artifact.files), "it is of this machine"


@RTX
@pytest.mark.usefixtures("in_process")
def test_two_members_of_one_sm_share_their_engines(tmp_path: Path, context: Context, models: Models) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('name = "fleet"\ntitle = "F"\nkind = "family"\nmembers = ["l4", "l40s", "h100"]\n')
    stage = CompileStage(compile_config(load_target(str(fleet))))
    result = stage({"quantize": models(tmp_path / "q", fp16=True)}, context)
    members = {m.name: m for m in compile_record_from_file(result.artifact.file("compile.json")).members}
    assert members["l4"].engines == members["l40s"].engines
    assert result.artifact.provenance["measured"]["engines"] == 2
    assert members["h100"].status == "deferred"


@RTX
@pytest.mark.usefixtures("in_process")
def test_what_a_recipe_asks_is_in_the_engines(tmp_path: Path, context: Context, models: Models) -> None:
    asked = EngineConfig(weight_streaming=True, usual_batch=4, largest_batch=64)
    stage = CompileStage(compile_config(load_target("t4"), engine=asked))
    artifact = stage({"quantize": models(tmp_path / "q", fp16=True)}, context).artifact
    record = plan_metadata_from_file(artifact.file("engines/fp16-image-sm75-t4.json"))
    assert record.options == {"weight_streaming": True}
    pixels = record.profiles[0]["pixels"]
    assert (pixels.min[0], pixels.opt[0], pixels.max[0]) == (1, 4, 64)


def test_what_no_release_or_no_machine_grants_is_refused_before_anything_is_made() -> None:
    def ask(name: str, **options: Any) -> None:
        require_options(resolve_target(load_target(name), EngineConfig(**options)))

    ask("jetson-agx-orin-64gb", weight_streaming=True, refit=True)
    ask("cpu", refit=True)
    with pytest.raises(UserError, match="jetson-agx-xavier: weight_streaming begins with TensorRT 10"):
        ask("jetson-agx", weight_streaming=True)
    with pytest.raises(UserError, match="t4: TensorRT-RTX ships no lean runtime"):
        ask("t4", version_compatible=True)
    if decided("t4", this_host())["t4"].status == "build" and not cuda_devices():
        with pytest.raises(UserError, match="t4: TensorRT-RTX builds refittable plans on a GPU only"):
            ask("t4", refit=True)


@pytest.mark.parametrize(("name", "status"), [("cpu", "onnxruntime"), ("jetson-agx", "deferred")])
def test_a_target_without_engines_still_gets_its_account(
    name: str, status: str, tmp_path: Path, context: Context, models: Models
) -> None:
    stage = CompileStage(compile_config(load_target(name)))
    artifact = stage({"quantize": models(tmp_path / "q", fp16=True)}, context).artifact
    assert list(artifact.files) == ["compile.json"]
    record = compile_record_from_file(artifact.file("compile.json"))
    assert {member.status for member in record.members} == {status}


def test_changing_the_target_or_a_library_changes_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Models
) -> None:
    inputs = {"quantize": models(tmp_path / "q", fp16=True)}
    t4, cpu = (
        CompileStage(compile_config(load_target("t4"))),
        CompileStage(compile_config(load_target("cpu"))),
    )
    before, cpu_before = t4.key(inputs), cpu.key(inputs)
    assert before != cpu_before
    newer = Host(tensorrt=None, tensorrt_rtx="9.9", sms=())
    monkeypatch.setattr("edgeglm.compile.decision.this_host", lambda: newer)
    assert t4.key(inputs) != before
    assert cpu.key(inputs) == cpu_before


def test_a_tower_that_is_missing_is_found_before_anything_is_built(
    tmp_path: Path, context: Context, image_tower: Callable[..., Path]
) -> None:
    stage = CompileStage(compile_config(load_target("cpu")))
    with pytest.raises(UserError, match="no models"):
        stage({"quantize": Artifact(kind="quantize", path=tmp_path, files={})}, context)
    image_tower(tmp_path / "half" / "models" / "fp16" / "image.onnx")
    half = Artifact(kind="quantize", path=tmp_path / "half", files=listing_of(tmp_path / "half"))
    with pytest.raises(UserError, match=r"'fp16' lacks text\.onnx"):
        stage({"quantize": half}, context)


def test_a_broken_compile_record_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "compile.json").write_text('{"schema": 9}')
    with pytest.raises(UserError, match="build the bundle again"):
        compile_record_from_file(tmp_path / "compile.json")


def test_names_and_profiles_follow_the_contract() -> None:
    assert precision_of("int8-linear") == "int8"
    assert variants_of({"models/fp16/text.onnx": "", "models/fp16/image.onnx": "", "x.json": ""}) == {
        "fp16": ("image", "text")
    }
    assert tower_profile("image", (1, 2, 4), (1, 2, 3))["pixels"].max == (4, -1, -1, -1)
    assert tower_profile("text", (1, 2, 4), (1, 2, 3))["attention_mask"].opt == (2, 2)
    assert msgspec.to_builtins(compile_config(load_target("t4")))["target"]["target"]["name"] == "t4"
