"""Folders as people have them: what lies in them besides the samples, and what is written from them."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from PIL import Image

from edgeglm.calibration import curve
from edgeglm.calibration.drawing import Drawing, calibration_set_for_model
from edgeglm.calibration.intake import Reading, candidates_from_data
from edgeglm.cli.main import exit_code
from edgeglm.core.errors import UserError
from edgeglm.engines.protocol import TensorSpec
from tests.calibration.towers import tower_tensors

SPEC = TensorSpec(name="pixels", dtype="float32", shape=("n", 3, 8, 8))


def _pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 2 * number, 40)).save(path, "PNG")
    return folder


def _ids(folder: Path) -> list[str]:
    return list(candidates_from_data(folder, [SPEC], reading=Reading()).ids)


def test_hidden_files_are_no_samples(tmp_path: Path) -> None:
    folder = _pictures(tmp_path, "a.png", ".Trash-0/b.png", "c/.ipynb_checkpoints/d.png", "c/e.PNG")
    (folder / "._a.png").write_bytes(b"\0\5\x16\7 what a Mac writes beside a.png")
    assert _ids(folder) == ["a.png", "c/e.PNG"]


def test_every_kind_of_picture_is_a_sample(tmp_path: Path) -> None:
    names = ["a.JPeG", "b.tif", "c.tiff", "d.jfif", "e.webp"]
    assert _ids(_pictures(tmp_path, *names)) == names


def test_a_set_that_was_drawn_into_the_folder_is_not_drawn_from(fp32_dir: Path, tmp_path: Path) -> None:
    folder = _pictures(tmp_path / "data", *(f"{number}.png" for number in range(6)))
    drawn = [
        calibration_set_for_model(folder, fp32_dir / "image.onnx", folder / "set", drawing=Drawing(samples=4))
        for _ in range(2)
    ]
    assert drawn[0].record == drawn[1].record
    assert {sample.id.rpartition(".")[2] for sample in drawn[1].record.towers["model"].samples} == {"png"}


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    folder = _pictures(tmp_path, "a.png", "b.png")
    np.savez(folder / "x.npz", pixels=np.zeros((4, 3, 8, 8), np.float32))
    with pytest.raises(UserError, match=r"1 \.npz and 2 images.*give the folder of either"):
        _ids(folder)


def test_a_picture_too_large_to_open_is_refused_when_it_is_drawn(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    folder = _pictures(tmp_path, "a.png", "c.png")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))
    found = candidates_from_data(folder, [SPEC], reading=Reading())
    assert found.traits["resolution"] == ["9x9", "unreadable", "9x9"]
    assert len(found.tensors([0, 2])["pixels"]) == 2
    with pytest.raises(UserError, match=r"b\.png has more than \d+ pixels; give a smaller one"):
        found.tensors([1])


def _drawn(fp32_dir: Path, folder: Path, rows: int, repeats: int, *options: str) -> int:
    pixels = np.repeat(tower_tensors("image", rows)["pixels"], repeats, axis=0)
    np.savez(folder / "x.npz", pixels=pixels)
    return exit_code(
        ["calibrate", str(folder / "x.npz"), "--model", str(fp32_dir / "image.onnx"),
         "--output", str(folder / "set"), *options]
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "repeats"), [(4, 8), (32, 1)])
def test_equal_samples_are_counted(
    fp32_dir: Path, tmp_path: Path, rows: int, repeats: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _drawn(fp32_dir, tmp_path, rows, repeats) == 0
    said = "28 of 32 samples equal an earlier one; 4 differ"
    assert (said in capsys.readouterr().err) == (repeats > 1)
    quantize = ["quantize", str(fp32_dir / "image.onnx"), "--data", str(tmp_path / "set"), "--gate", "0"]
    exit_code([*quantize, "--evaluations", "1", "--output", str(tmp_path / "out")])
    assert (said in capsys.readouterr().err) == (repeats > 1)


def test_a_curve_that_fails_leaves_the_earlier_set_and_its_curve(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _drawn(fp32_dir, tmp_path, 16, 1, "--curve", "4,8") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    assert len(json.loads(before["curve.json"])) == 2

    def cut_off(*_: object, **__: object) -> None:
        raise UserError("cut off; try again")

    monkeypatch.setattr(curve, "curve_of_sizes", cut_off)
    assert _drawn(fp32_dir, tmp_path, 12, 1, "--curve", "4,8") == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"set", "x.npz"}


@pytest.mark.parametrize("scheme", ["dynamic", "dynamic-reduced"])
def test_ways_to_find_ranges_are_refused_where_none_are_found(
    fp32_dir: Path, tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(fp32_dir / "text.onnx"), "--data", "x.npz", "--output", str(tmp_path / "o")]
    assert exit_code([*arguments, "--scheme", scheme, "--method", "mse"]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert (
        f"--method would be ignored: --scheme {scheme} finds ranges at run time; leave --method out" in said
    )
