from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from edgeglm.bundle.manifest import TensorRecord, TowerRecord
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.cli import main as cli
from edgeglm.compile.triton import triton_models, write_repository
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import EngineConfig
from edgeglm.targets.schema import load_target, resolve_target, toml_from_resolved
from scripts.fixtures.colours import colour_bundle
from tests.compile.stand_ins import LAPTOP, ORIN, finalized, made

EMBEDDING = (TensorRecord(name="embedding", dtype="float32", shape=("batch", 3)),)


def described(folder: Path, source: Path) -> Path:
    """Write a bundle again with a manifest that says what the towers take."""
    with open_bundle(source) as bundle:
        towers = {
            "image": TowerRecord(
                inputs=(TensorRecord(name="pixels", dtype="float32", shape=("batch", 3, 4, 4)),),
                outputs=EMBEDDING,
                embedding_dim=3,
                parameters=0,
            ),
            "text": TowerRecord(
                inputs=tuple(
                    TensorRecord(name=name, dtype="int64", shape=("batch", "length"))
                    for name in ("input_ids", "attention_mask")
                ),
                outputs=EMBEDDING,
                embedding_dim=3,
                parameters=0,
            ),
        }
        sources: dict[str, Path | bytes] = {
            name: bundle.file(name).read_bytes() for name in bundle.manifest.files if name != "bom.cdx.json"
        }
        manifest = msgspec.structs.replace(bundle.manifest, towers=towers, files={}, content_digest="")
    return write_bundle(folder, sources=sources, manifest=manifest)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return described(tmp_path / "demo", made(tmp_path / "plain", "jetson-agx-orin-64gb"))


def opened(path: Path) -> Bundle:
    return open_bundle(path)


def test_each_tower_becomes_a_model_that_triton_can_batch(path: Path, tmp_path: Path):
    bundle = opened(path)
    models = triton_models(bundle, variant="int8", queue_microseconds=500)
    write_repository(bundle, models, tmp_path / "repository", "int8")
    root = tmp_path / "repository"
    assert {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} == {
        "edgeglm.json",
        "colours_image/config.pbtxt",
        "colours_image/1/model.onnx",
        "colours_image/preprocessing.json",
        "colours_text/config.pbtxt",
        "colours_text/1/model.onnx",
        "colours_text/preprocessing.json",
        "colours_text/tokenizer.json",
    }
    assert (root / "colours_text/1/model.onnx").read_bytes() == bundle.model("int8", "text").read_bytes()
    config = (root / "colours_text/config.pbtxt").read_text()
    assert 'platform: "onnxruntime_onnx"' in config
    assert re.findall(r"dims: \[ (.*) \]", config) == ["-1", "-1", "3"]
    assert "max_queue_delay_microseconds: 500" in config
    about = json.loads((root / "edgeglm.json").read_bytes())
    assert about["variant"] == "int8"
    assert about["embedding_space"] == bundle.manifest.space.fingerprints["int8"]


def test_triton_itself_would_parse_the_configuration(path: Path):
    proto = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    for model in triton_models(opened(path)):
        config = text_format.Parse(model.config, proto.ModelConfig())
        assert config.name == model.name
        assert config.max_batch_size == 32
        assert config.dynamic_batching.max_queue_delay_microseconds == 1000


def test_a_board_serves_the_plans_that_it_tested(path: Path, tmp_path: Path):
    receipt = finalized(path, ORIN)
    models = triton_models(opened(path), receipt=receipt)
    assert [model.file for model in models] == ["model.plan", "model.plan"]
    assert 'platform: "tensorrt_plan"' in models[0].config
    assert models[1].source.read_bytes() == b"plan of int8 text"


def test_triton_sends_no_more_at_once_than_a_recipe_asked_the_engines_for(path: Path, tmp_path: Path):
    resolved = resolve_target(load_target("jetson-agx-orin-64gb"), EngineConfig(largest_batch=96))
    with open_bundle(path) as bundle:
        sources: dict[str, Path | bytes] = {n: bundle.file(n) for n in bundle.manifest.files}
        del sources["bom.cdx.json"]
        sources["target.toml"] = toml_from_resolved(resolved).encode()
        wide = write_bundle(tmp_path / "wide" / "demo", sources=sources, manifest=bundle.manifest)
    for models in (
        triton_models(opened(wide)),
        triton_models(opened(wide), receipt=finalized(wide, ORIN)),
    ):
        for model in models:
            assert "max_batch_size: 96" in model.config
            assert "preferred_batch_size: [ 8, 16, 32, 64 ]" in model.config


def test_what_triton_cannot_load_is_refused(path: Path, tmp_path: Path):
    receipt = msgspec.structs.replace(finalized(path, LAPTOP), library="tensorrt-rtx")
    with pytest.raises(UserError, match="not of TensorRT-RTX; export the ONNX files instead"):
        triton_models(opened(path), receipt=receipt)
    with pytest.raises(UserError, match="does not say what the image tower takes"):
        triton_models(opened(colour_bundle(tmp_path / "old")))


def test_a_folder_that_is_there_is_left_alone(path: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    bundle = opened(path)
    with pytest.raises(UserError, match="choose a new folder"):
        write_repository(bundle, triton_models(bundle), tmp_path / "taken", "fp32")
    assert list((tmp_path / "taken").iterdir()) == []


@pytest.mark.parametrize("place", ["repository", "models/repository"])
def test_a_repository_never_goes_into_the_bundle_whose_digests_it_would_break(
    path: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "link").symlink_to(path)
    for bundle in (path, tmp_path / "link"):
        assert cli.exit_code(["export-repository", str(path), "--output", str(bundle / place)]) == 2
        assert "choose a folder outside it" in capsys.readouterr().err.replace("\n", " ")
    assert cli.exit_code(["verify", str(path)]) == 0


def test_the_command_writes_it_and_asks_for_a_receipt_where_one_is_needed(path: Path, tmp_path: Path, capsys):
    assert cli.exit_code(["export-repository", str(path), "--output", str(tmp_path / "r"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["colours_image", "colours_text"]
    asked = ["export-repository", str(path), "--output", str(tmp_path / "f"), "--finalized"]
    assert cli.exit_code(asked) == 2
    assert "run 'edgeglm finalize' first" in capsys.readouterr().err
    assert cli.exit_code(["finalize", str(path), "--rounds", "7"]) == 0
    capsys.readouterr()
    assert cli.exit_code(asked) == 0
    assert (tmp_path / "f/colours_text/1/model.onnx").is_file()
