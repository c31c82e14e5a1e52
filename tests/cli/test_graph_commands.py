"""`edgeglm lint`, `fusions`, `lower` and `inspect` of an ONNX file, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

onnx = pytest.importorskip("onnx")

import numpy as np  # noqa: E402

from edgeglm.cli.main import exit_code  # noqa: E402
from edgeglm.core.digest import sha256_file  # noqa: E402
from edgeglm.export.calibration_cache import cache_from_file  # noqa: E402
from scripts.fixtures.planted import WIDTH, planted  # noqa: E402
from tests.calibration.towers import text_tower  # noqa: E402
from tests.export.test_lowering import quantized  # noqa: E402


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(text_tower(), tmp_path / "text.onnx")
    return tmp_path / "text.onnx"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    code = exit_code([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_a_model_is_lowered_or_refused_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, found, _ = said(
        capsys, "lower", model, "--output", tmp_path / "a.onnx", "--target", "jetson-agx-xavier"
    )
    assert (code, found["opset"]) == (0, 16)
    assert onnx.load(tmp_path / "a.onnx").opset_import[0].version == 16
    code, found, err = said(capsys, "lower", model, "--output", tmp_path / "b.onnx", "--target", "t4")
    assert (code, found) == (2, None)
    assert "does not take lane A" in err
    assert not (tmp_path / "b.onnx").exists()
    code, _, err = said(
        capsys, "lower", model, "--output", tmp_path / "b.onnx", "--calibration-cache", tmp_path / "c"
    )
    assert code == 2
    assert "quantizes no activation; quantize it first" in err
    assert not (tmp_path / "c").exists()


def test_a_calibration_cache_names_tensors_of_the_file_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    onnx.save(quantized(), tmp_path / "q.onnx")
    code, _, err = said(
        capsys,
        "lower",
        tmp_path / "q.onnx",
        "--output",
        tmp_path / "a.onnx",
        "--calibration-cache",
        tmp_path / "c",
    )
    assert (code, err) == (0, "")
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert not any("Quantize" in node.op_type for node in graph.node)
    names = {v.name for v in graph.input} | {name for node in graph.node for name in node.output}
    assert set(cache_from_file(tmp_path / "c").scales) <= names


def test_lint_names_what_overflows_and_mends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad, kind, node = planted()["mask of (1 - m) * -1e9"]
    onnx.save(bad, tmp_path / "bad.onnx")
    np.savez(tmp_path / "x.npz", x=np.ones((2, 4, WIDTH), np.float32))
    code, found, _ = said(
        capsys,
        "lint",
        tmp_path / "bad.onnx",
        "--data",
        tmp_path / "x.npz",
        "--output",
        tmp_path / "good.onnx",
    )
    assert code == 0
    assert (found["findings"][0]["kind"], found["findings"][0]["node"]) == (kind, node)
    assert found["clamped"] == ["huge"]
    code, found, _ = said(capsys, "lint", tmp_path / "good.onnx")
    assert (code, found["findings"]) == (0, [])
    (tmp_path / "broken.npz").write_bytes(b"none")
    code, _, err = said(capsys, "lint", tmp_path / "bad.onnx", "--data", tmp_path / "broken.npz")
    assert code == 2
    assert "write them with numpy.savez" in err


def test_fusions_are_listed_and_the_model_rewritten(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, found, _ = said(capsys, "fusions", model, "--write", tmp_path / "w.onnx")
    assert code == 0
    assert {row["pattern"] for row in found["report"]["rows"]} == {"layer-norm", "gelu"}
    assert (tmp_path / "w.onnx").is_file()
    assert exit_code(["fusions", str(model)]) == 0
    assert "layer-norm" in capsys.readouterr().out


def test_fusions_finds_the_layers_of_a_finalized_bundle(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bundled = tmp_path / "bundle" / "models" / "int8" / "text.onnx"
    bundled.parent.mkdir(parents=True)
    bundled.write_bytes(model.read_bytes())
    layers = {"Layers": [{"Name": "one_kernel", "Metadata": "[ONNX Layer: up/Gelu]"}]}
    for signature, digest in (("a" * 64, sha256_file(model)), ("b" * 64, "0" * 64)):
        folder = tmp_path / "bundle.finalized" / "engines" / signature
        folder.mkdir(parents=True)
        record = {"library": "tensorrt", "library_version": "10.3.0", "sms": [87], "onnx_sha256": digest,
                  "plan_sha256": "1" * 64, "size_bytes": 1, "profiles": [], "precision": "int8",
                  "inputs": [], "outputs": []}  # fmt: skip
        (folder / "engine.json").write_text(json.dumps(record))
        (folder / "layers.json").write_text(json.dumps(layers if digest != "0" * 64 else {"Layers": []}))
    code, found, _ = said(capsys, "fusions", bundled)
    assert code == 0
    assert "a" * 64 in found["layers"]
    rows = [row for row in found["report"]["rows"] if row["pattern"] == "gelu"]
    assert ["one_kernel"] in [row["layers"] for row in rows]


@pytest.mark.parametrize(
    "arguments", [("lower", "--output"), ("lint", "--data", "x.npz", "--output"), ("fusions", "--write")]
)
def test_no_command_writes_over_its_model(
    arguments: tuple[str, ...], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "alias.onnx").hardlink_to(model)
    before = model.read_bytes()
    command, *options = arguments
    for out in (model, tmp_path / "no" / ".." / "text.onnx", tmp_path / "alias.onnx"):
        code, _, err = said(capsys, command, model, *options, out)
        assert (code, model.read_bytes()) == (2, before)
        assert "would be written over" in err.replace("\n", " ")


@pytest.mark.parametrize("arguments", [("lower", "--output"), ("fusions", "--write"), ("lint", "--output")])
def test_a_folder_that_cannot_be_made_is_a_users_error(
    arguments: tuple[str, ...], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    ids = np.ones((2, 4), np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=ids)
    data = ("--data", tmp_path / "x.npz") if arguments[0] == "lint" else ()
    command, option = arguments
    code, _, err = said(capsys, command, model, *data, option, tmp_path / "file" / "a.onnx")
    assert code == 2
    assert "choose a folder that can be written" in err.replace("\n", " ")


def test_a_model_that_no_runtime_knows_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    odd = text_tower()
    odd.graph.node[2].op_type, odd.graph.node[2].domain = "Frobnicate", "strange"
    odd.opset_import.append(onnx.helper.make_opsetid("strange", 1))
    onnx.save(odd, tmp_path / "odd.onnx")
    ids = np.ones((2, 4), np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=ids)
    code, _, err = said(capsys, "lint", tmp_path / "odd.onnx", "--data", tmp_path / "x.npz")
    assert code == 2
    assert "ONNX Runtime cannot run the model" in err


def test_inspect_shows_an_onnx_file(model: Path, capsys: pytest.CaptureFixture[str]):
    code, found, _ = said(capsys, "inspect", model)
    assert (code, found["precision"], found["opsets"]) == (0, "fp32", {"ai.onnx": 20})
