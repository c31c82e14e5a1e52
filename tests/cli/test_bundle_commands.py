"""The commands that take a bundle, on a real one: two towers in ONNX that embed colours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeglm.cli import main as cli
from scripts.fixtures.colours import COLOURS, colour_bundle, colour_tower, picture


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    parts: dict[str, bytes] = {
        f"models/{variant}/{kind}.onnx": colour_tower(kind, scale=1.0 if variant == "fp32" else -1.0)
        for variant in ("fp32", "int8")
        for kind in ("image", "text")
    }
    return colour_bundle(tmp_path / "colours", **parts, **{"report.html": b"<html>report</html>"})


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = cli.exit_code([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_run_ranks_and_names_the_variant_and_the_file_it_used(bundle: Path, capsys):
    text = ran(capsys, "run", bundle, "--query", "green")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[0] == ["rank", "score", "text", "id", "thumbnail"]
    assert lines[2][:6] == ["1", "1.0000", "a", "green", "thing", "set/green"]
    assert "variant fp32, models/fp32/text.onnx" in text


def test_run_searches_with_a_picture_too(bundle: Path, capsys, tmp_path: Path):
    (tmp_path / "blue.png").write_bytes(picture(COLOURS["blue"]))
    result = json.loads(ran(capsys, "run", bundle, "--image", tmp_path / "blue.png", "-k", 1, "--json"))
    assert [hit["id"] for hit in result["hits"]] == ["set/blue"]
    assert (result["variant"], result["model"]) == ("fp32", "models/fp32/image.onnx")
    assert result["hits"][0]["rank"] == 1


def test_run_uses_the_variant_that_was_asked_for(bundle: Path, capsys):
    result = json.loads(
        ran(capsys, "run", bundle, "--query", "red", "--variant", "int8", "-k", "3", "--json")
    )
    assert result["model"] == "models/int8/text.onnx"
    assert result["hits"][-1]["score"] == -1.0
    thumbnails = [hit["thumbnail"] for hit in result["hits"] if hit["id"] == "set/red"]
    assert thumbnails == [str(bundle / "gallery/thumbnails/red.png")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--query", "red", "--variant", "fp61"], "unknown variant 'fp61'; known: fp32, int8; did you mean"),
        (["--query", " "], "a query is empty"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--query", "red", "--image", "x.png"], "give either --query TEXT or --image FILE"),
    ],
)
def test_a_query_that_cannot_be_answered_is_bad_input(arguments, words, bundle: Path, capsys):
    assert cli.exit_code(["run", str(bundle), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_verify_says_intact_and_prints_the_digest_that_decides(bundle: Path, capsys):
    text = ran(capsys, "verify", bundle)
    digest = json.loads((bundle / "manifest.json").read_bytes())["content_digest"]
    assert "intact" in text
    assert f"content digest {digest}" in text.splitlines()


def test_one_altered_byte_ends_verify_and_run_with_2(bundle: Path, capsys):
    model = bundle / "models/fp32/text.onnx"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.chmod(0o644)
    model.write_bytes(data)
    for command in (["verify", bundle], ["run", bundle, "--query", "red"]):
        assert cli.exit_code([str(part) for part in command]) == 2
        assert "models/fp32/text.onnx" in capsys.readouterr().err


def test_verify_run_finds_the_variant_that_answers_otherwise_here(bundle: Path, capsys):
    assert cli.exit_code(["verify", str(bundle), "--run"]) == 3
    captured = capsys.readouterr()
    assert "fp32: worst cosine 1.00000 over 2 pictures, 1.00000 over 2 texts" in captured.out
    assert "golden outputs differ on this machine for int8;" in captured.err


def test_inspect_shows_variants_and_target(bundle: Path, capsys):
    text = ran(capsys, "inspect", bundle)
    for word in ("fp32 (default)", "int8", "cpu", "content digest"):
        assert word in text
    manifest = json.loads(ran(capsys, "inspect", bundle, "--json"))
    assert manifest["default_variant"] == "fp32"


def test_report_is_found_or_copied(bundle: Path, capsys, tmp_path: Path):
    assert ran(capsys, "report", bundle).strip() == str(bundle / "report.html")
    (tmp_path / "out").mkdir()
    ran(capsys, "report", bundle, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == b"<html>report</html>"
    assert ran(capsys, "report", bundle, "--output", bundle).strip() == str(bundle / "report.html")
    assert cli.exit_code(["report", str(bundle), "--output", str(tmp_path / "none" / "r.html")]) == 2
    assert "choose a folder that is there" in capsys.readouterr().err
