from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("modelopt")

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeglm.calibration.curve import largest_size
from edgeglm.calibration.drawing import Drawing, batches_for_model, calibration_set_for_model
from edgeglm.calibration.feeds import mapped_npz, write_npz
from edgeglm.calibration.sets import open_calibration_set
from edgeglm.cli.main import exit_code
from edgeglm.core.errors import UserError
from tests.calibration.towers import tower_tensors


def _pictures(folder: Path, classes: int = 3, each: int = 6) -> Path:
    random = np.random.default_rng(0)
    for number in range(classes):
        (folder / f"class{number}").mkdir(parents=True)
        for i in range(each):
            pixels = random.integers(0, 255, (20 + number, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{number}" / f"{i}.png")
    return folder


def test_a_folder_of_classes_is_drawn_evenly_and_its_coverage_is_told(fp32_dir: Path, tmp_path: Path) -> None:
    made = calibration_set_for_model(
        _pictures(tmp_path / "data"),
        fp32_dir / "image.onnx",
        tmp_path / "set",
        drawing=Drawing(samples=9, batch_size=4),
    )
    part = made.record.towers["model"]
    assert part.strata == {"class0": 3, "class1": 3, "class2": 3}
    assert part.coverage["resolution"].candidates == 3
    assert part.coverage["resolution"].share == 1.0
    assert [len(b["pixels"]) for b in made.batches("model")] == [4, 4, 1]
    assert made.batches("model")[0]["pixels"].shape == (4, 3, 16, 16)


def test_a_line_of_text_becomes_what_the_model_takes(fp32_dir: Path, tmp_path: Path) -> None:
    lines = [{"text": f"word {i} and more", "stratum": "ab"[i % 2]} for i in range(10)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = calibration_set_for_model(
        tmp_path / "texts.jsonl",
        fp32_dir / "text.onnx",
        tmp_path / "set",
        drawing=Drawing(samples=6),
        tokenizer=_tokenizer(tmp_path),
    )
    feeds = made.batches("model")[0]
    assert feeds["input_ids"].shape == feeds["attention_mask"].shape
    assert made.record.towers["model"].strata == {"a": 3, "b": 3}


def _tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "word", "and", "more", *map(str, range(10))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_sample_that_the_evaluation_holds_is_refused_by_its_content(fp32_dir: Path, tmp_path: Path) -> None:
    data = _pictures(tmp_path / "data")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "renamed.png").write_bytes((data / "class1" / "2.png").read_bytes())
    with pytest.raises(UserError, match=r"evaluation samples too \(class1/2.png\)"):
        calibration_set_for_model(
            data,
            fp32_dir / "image.onnx",
            tmp_path / "set",
            drawing=Drawing(samples=18),
            evaluation=tmp_path / "evaluation",
        )
    assert not (tmp_path / "set").exists()


def _npz(path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {**tower_tensors("image", 8), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": np.zeros((8, 3, 8, 8), np.float32)}, "has the shape"),
        ({"pixels": np.zeros((8, 3, 16, 16), np.float64)}, "convert it with"),
        ({"pixels": np.full((8, 3, 16, 16), np.nan, np.float32)}, "NaN"),
        ({"pixels": np.zeros((0, 3, 16, 16), np.float32)}, "no sample"),
        ({"pixels": np.zeros((1, 3, 16, 16), np.float32)}, "at least 2"),
        ({"pixels": None, "pixles": np.zeros((8, 3, 16, 16), np.float32)}, "did you mean 'pixels'"),
        ({"pixels": None}, "no array for the input"),
        ({"pixels": np.array([{}] * 8)}, "no .npz that can be read"),
    ],
)
@pytest.mark.parametrize("command", ["calibrate", "quantize"])
def test_samples_that_do_not_fit_exit_with_2_and_leave_nothing(
    fp32_dir: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, model, out = (
        str(_npz(tmp_path / "x.npz", **changes)),
        str(fp32_dir / "image.onnx"),
        tmp_path / "out",
    )
    if command == "calibrate":
        code = exit_code(["calibrate", data, "--model", model, "--output", str(out)])
    else:
        code = exit_code(["quantize", model, "--data", data, "--output", str(out)])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_no_data_never_means_random_data(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", "--model", str(fp32_dir / "text.onnx"), "--output", str(tmp_path / "set")]
    assert exit_code(arguments) == 2
    assert "--allow-random-calibration" in capsys.readouterr().err
    random = [*arguments, "--allow-random-calibration"]
    assert exit_code(random) == 2
    assert "--shape input_ids:1x" in capsys.readouterr().err  # dynamic dimensions are nobody's guess
    assert exit_code([*random, "--shape", "input_ids:1x6", "--shape", "attention_mask:1x6"]) == 0
    assert open_calibration_set(tmp_path / "set").record.source == "random"


@pytest.mark.parametrize(
    ("tower", "options", "message"),
    [
        ("image", ("--shape", "pixel:1x3x16x16"), "did you mean 'pixels'"),
        ("image", ("--shape", "pixels:1x3x8x8"), "expected pixels float32"),
        ("text", ("--shape", "input_ids:1x6", "--shape", "attention_mask:1x4"), "make them equal"),
    ],
)
def test_noise_that_the_model_cannot_take_is_refused(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tower: str, options: Any, message: str
) -> None:
    drawn = ["calibrate", "--model", str(fp32_dir / f"{tower}.onnx"), "--output", str(tmp_path / "set")]
    assert exit_code([*drawn, "--allow-random-calibration", *options]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "set").exists()


def test_a_stratum_is_named_for_every_row(fp32_dir: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = {**tower_tensors("image", 8), "stratum": np.array(["a", "b"])}
    np.savez(tmp_path / "data.npz", **data)
    with pytest.raises(UserError, match="one of each of 8 rows"):
        calibration_set_for_model(
            tmp_path / "data.npz", fp32_dir / "image.onnx", tmp_path / "set", drawing=Drawing()
        )


def test_a_set_and_its_curve_are_told_as_json(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _npz(tmp_path / "x.npz", pixels=tower_tensors("image", 40)["pixels"])
    code = exit_code(
        ["calibrate", str(data), "--model", str(fp32_dir / "image.onnx"), "--output", str(tmp_path / "set"),
         "--samples", "40", "--curve", "4,8,30", "--json"]
    )  # fmt: skip
    assert code == 0
    said = json.loads(capsys.readouterr().out)
    assert [point["samples"] for point in said["curve"]] == [4, 8, 30]
    assert all(point["mean_cosine"] > 0.99 for point in said["curve"])
    assert json.loads((tmp_path / "set" / "curve.json").read_text()) == said["curve"]


def test_a_set_for_another_model_is_refused(fp32_dir: Path, tmp_path: Path) -> None:
    made = calibration_set_for_model(
        _npz(tmp_path / "x.npz"), fp32_dir / "image.onnx", tmp_path / "set", drawing=Drawing(samples=4)
    )
    assert batches_for_model(made, fp32_dir / "image.onnx").samples == 4
    with pytest.raises(UserError, match="draw one for this model"):
        batches_for_model(made, fp32_dir / "text.onnx")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3))
def test_what_is_written_in_chunks_reads_back_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    rows = random.random((sum(sizes), 3), dtype=np.float32)
    cuts = np.cumsum(sizes)[:-1]
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    chunks: list[dict[str, Any]] = [{"x": part, "y": part.astype(np.int64)} for part in np.split(rows, cuts)]
    write_npz(path, chunks, len(rows))
    np.testing.assert_array_equal(mapped_npz(path)["x"], rows)
    with np.load(path) as plain:  # anybody's numpy reads it
        np.testing.assert_array_equal(plain["x"], rows)
        np.testing.assert_array_equal(plain["y"], rows.astype(np.int64))


@pytest.mark.parametrize("cut", [0, 10, 200, -40])
def test_a_damaged_archive_is_a_users_error(tmp_path: Path, cut: int) -> None:
    path = _npz(tmp_path / "x.npz")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"no .npz that can be read"):
        mapped_npz(path)


def test_compressed_archives_are_read_too(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {**tower_tensors("image", 4)}
    np.savez_compressed(tmp_path / "x.npz", **tensors)
    np.testing.assert_array_equal(
        mapped_npz(tmp_path / "x.npz")["pixels"], tower_tensors("image", 4)["pixels"]
    )


def test_a_spread_of_zero_is_refused_before_it_divides(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _pictures(tmp_path / "data")
    arguments = ["calibrate", str(tmp_path / "data"), "--model", str(fp32_dir / "image.onnx")]
    assert exit_code([*arguments, "--output", str(tmp_path / "set"), "--std", "0", "0", "0"]) == 2
    assert "give three positive numbers" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("write", ["savez", "savez_compressed"])
def test_drawing_from_many_samples_takes_the_memory_of_few(
    fp32_dir: Path, tmp_path: Path, write: str
) -> None:
    """32 MB of candidates, stored or compressed; the process grows by a few."""
    many = np.random.default_rng(0).random((10_000, 3, 16, 16), dtype=np.float32)
    getattr(np, write)(tmp_path / "many.npz", pixels=many)
    del many
    code = (
        "import sys; from pathlib import Path\n"
        "from edgeglm.calibration.drawing import Drawing, calibration_set_for_model, model_inputs\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "import edgeglm.calibration.sets, zipfile, tempfile; data, model, out = map(Path, sys.argv[1:])\n"
        "model_inputs(model); before = peak()\n"
        "calibration_set_for_model(data, model, out, drawing=Drawing(samples=64)); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "many.npz", fp32_dir / "image.onnx", tmp_path / "set"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 12_000  # kB


def test_a_curve_that_cannot_be_drawn_is_refused_before_the_set_is_written(
    fp32_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", str(_npz(tmp_path / "x.npz")), "--model", str(fp32_dir / "image.onnx")]
    for sizes, message in (("4,x", "cannot read the sizes"), ("4,100", "give smaller sizes")):
        drawn = [*arguments, "--output", str(tmp_path / "set"), "--samples", "8", "--curve", sizes]
        assert exit_code(drawn) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "set").exists()
    few = _npz(tmp_path / "few.npz", pixels=tower_tensors("image", 16)["pixels"])
    arguments[1] = str(few)  # 128 are asked for, and 16 are there
    assert exit_code([*arguments, "--output", str(tmp_path / "set"), "--curve", "4,64"]) == 2
    assert "16 samples leave 12 to calibrate on" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "set").exists()


def test_a_model_of_whole_batches_has_a_curve_of_whole_batches() -> None:
    assert largest_size(10, [4, 7]) == 8
    assert largest_size(16, [4, 12], fixed=4) == 12
    assert largest_size(20, [4, 12], fixed=4) == 12  # 8 to measure, not 5
    with pytest.raises(UserError, match="batches of 4, which 6 does not fill"):
        largest_size(16, [4, 6], fixed=4)


@pytest.mark.parametrize(
    "options",
    [
        ("--metric", "m:f"),
        ("--method", "max"),
        ("--shape", "pixels:1x3x16x16"),
        ("--allow-random-calibration",),
    ],
)
def test_calibrate_refuses_an_option_that_it_would_ignore(
    fp32_dir: Path, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    data = _npz(tmp_path / "x.npz", pixels=tower_tensors("image", 16)["pixels"])
    arguments = ["calibrate", str(data), "--model", str(fp32_dir / "image.onnx")]
    assert exit_code([*arguments, "--output", str(tmp_path / "set"), *options]) == 2
    assert f"{options[0]} would be ignored" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "options", [("--op", "Conv"), ("--scheme", "u8s8"), ("--method", "max"), ("--smooth", "0.5"), ("--rank",)]
)
def test_quantize_refuses_what_a_plan_or_a_set_has_decided(
    fp32_dir: Path, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    data = _npz(tmp_path / "x.npz", pixels=tower_tensors("image", 16)["pixels"])
    model, out = str(fp32_dir / "image.onnx"), ["--output", str(tmp_path / "out")]
    plan = ["--precision-plan", str(tmp_path / "plan.toml")]
    assert exit_code(["quantize", model, "--data", str(data), *out, *plan, *options]) == 2
    assert f"{options[0]} would be ignored: the plan says that" in capsys.readouterr().err
    calibration_set_for_model(data, Path(model), tmp_path / "set", drawing=Drawing(samples=8))
    assert exit_code(["quantize", model, "--data", str(tmp_path / "set"), *out, "--samples", "4"]) == 2
    assert "--samples would be ignored: the set was drawn already" in capsys.readouterr().err


def test_another_tokenizer_is_another_preprocessing(fp32_dir: Path, tmp_path: Path) -> None:
    lines = [{"text": f"word {i} and more"} for i in range(10)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tokenizer = _tokenizer(tmp_path / name)
        if name == "two":
            tokenizer.write_text(tokenizer.read_text().replace("more", "mean"))
        made = calibration_set_for_model(
            tmp_path / "texts.jsonl",
            fp32_dir / "text.onnx",
            tmp_path / name / "set",
            drawing=Drawing(samples=6),
            tokenizer=tokenizer,
        )
        digests.add(made.record.preprocessing_sha256)
    assert len(digests) == 2


def test_a_curve_shows_what_the_users_own_metric_keeps(
    fp32_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "halves.py").write_text("def score(path):\n    return 1.0 if 'int8' in path.name else 2.0\n")
    monkeypatch.chdir(tmp_path)
    data = _npz(tmp_path / "x.npz", pixels=tower_tensors("image", 16)["pixels"])
    code = exit_code(
        ["calibrate", str(data), "--model", str(fp32_dir / "image.onnx"), "--output", str(tmp_path / "set"),
         "--samples", "16", "--curve", "4,8", "--metric", "halves:score", "--method", "mse", "--json"]
    )  # fmt: skip
    assert code == 0
    assert [point["kept"] for point in json.loads(capsys.readouterr().out)["curve"]] == [0.5, 0.5]


@pytest.mark.parametrize("command", ["calibrate", "random", "quantize"])
def test_a_folder_that_holds_something_else_is_never_replaced(
    fp32_dir: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    project, keep = tmp_path / "project", tmp_path / "keep"
    project.mkdir()
    keep.mkdir()
    texts: dict[str, Any] = tower_tensors("text", 16)
    np.savez(project / "text.npz", **texts)
    (project / "text.onnx").write_bytes((fp32_dir / "text.onnx").read_bytes())
    (keep / "thesis.txt").write_text("years of work")
    (keep / "report.json").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    data, model = str(project / "text.npz"), str(project / "text.onnx")
    arguments = {
        "calibrate": ["calibrate", data, "--model", model],
        "random": ["calibrate", "--model", model, "--allow-random-calibration"],
        "quantize": ["quantize", model, "--data", data],
    }[command]
    for out, why in ((project, "lies in"), (keep, "did not write there")):
        assert exit_code([*arguments, "--output", str(out)]) == 2
        assert why in capsys.readouterr().err.replace("\n", " ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_evaluation_that_cannot_be_compared_proves_nothing(fp32_dir: Path, tmp_path: Path) -> None:
    """Digests of picture files and of arrays differ even where the pictures are the same."""
    data = _pictures(tmp_path / "data")
    made = calibration_set_for_model(
        data, fp32_dir / "image.onnx", tmp_path / "set", drawing=Drawing(samples=8)
    )
    pixels: dict[str, Any] = {"pixels": made.batches("model")[0]["pixels"]}
    np.savez(tmp_path / "same.npz", **pixels)
    for one, other in ((data, tmp_path / "same.npz"), (tmp_path / "same.npz", data)):
        with pytest.raises(UserError, match=r"its (files|arrays).* never agree; give both in one form"):
            calibration_set_for_model(
                one, fp32_dir / "image.onnx", tmp_path / "no", drawing=Drawing(), evaluation=other
            )
