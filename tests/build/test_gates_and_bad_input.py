"""If these fail, a user gets a bundle that is not good enough, or no word of how to put things right."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from edgeglm.build.tower_scores import TowerScores
from edgeglm.bundle.verify import open_bundle
from tests.build.conftest import Project, Said
from tests.skips import mount_small_disk


def remedy(said: Said) -> str:
    """Return the last clause of the one message of a command that failed."""
    lines = said.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert "Traceback" not in said.err
    return errors[0].rpartition(";")[2]


@pytest.mark.parametrize(
    ("gate", "words", "last"),
    [
        ("teacher_map10", "the teacher's mAP@10 on held-out", "lower gates.teacher_map10"),
        ("student_ratio", "student / teacher mAP@10", "lower gates.student_ratio"),
    ],
)
def test_below_a_gate_nothing_is_packed(
    gate: str, words: str, last: str, project: Project, cold: Said, tmp_path: Path
) -> None:
    said = project.build("cpu", "--set", f"gates.{gate}=1.0", output=tmp_path / "bundle")
    assert said.code == 3
    assert words in said.err
    assert last in remedy(said)
    assert not (tmp_path / "bundle").exists()


def test_few_queries_of_ones_own_are_judged_by_their_interval(
    project: Project, cold: Said, bundle: Path, tmp_path: Path
) -> None:
    ratio = json.loads((bundle / "metrics.json").read_text())["ratios"]["pools"]["names"]
    assert ratio["low"] < ratio["value"] < ratio["high"]
    gate = ("--set", f"gates.student_ratio={min(1.0, (ratio['value'] + ratio['high']) / 2)}")
    by_value = project.build("cpu", *gate, output=tmp_path / "value")
    assert by_value.code == 3
    by_interval = project.build("cpu", *gate, "--set", 'gates.judge="interval"', output=tmp_path / "interval")
    assert by_interval.code == 0, by_interval.err
    page = (tmp_path / "interval" / "report.html").read_text()
    assert "the build goes on, as the interval reaches the gate" in page


def test_a_shipped_recipe_judges_ones_own_data_by_the_interval_unless_it_is_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEGLM_OFFLINE", "1")
    (tmp_path / "pairs.jsonl").touch()
    project = Project(tmp_path, tmp_path / "store")
    arguments = ("build", "--target", "cpu", "--dry-run", "--json")

    def judge(*more: object) -> str:
        return str(project.edgeglm(*arguments, *more).json["recipe"]["gates"]["judge"])

    assert judge() == "value", "the shipped data has queries enough"
    assert judge("--data", tmp_path) == "interval"
    assert judge("--data", tmp_path, "--set", "gates.judge=value") == "value"


def test_a_candidate_below_the_gate_is_left_out_and_the_reasons_are_given(
    project: Project, cold: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = TowerScores.metrics

    def worse_at_fp16(self: TowerScores, files: Mapping[str, Path]) -> dict[str, Any]:
        found = measured(self, files)
        if files["image"].parent.name != "fp32":
            found["held-out"]["map10"]["value"] /= 2
        return found

    monkeypatch.setattr(TowerScores, "metrics", worse_at_fp16)
    changed = ("--set", 'quantize.candidates=["fp16"]', "--set", "gates.quantized_ratio=0.98")
    said = project.build("jetson-orin-nano", *changed, output=tmp_path / "bundle")
    assert said.code == 0, said.err
    rows = {row["title"]: row for row in said.json["rows"]}
    assert not rows["Student, FP16"]["kept"]
    with open_bundle(tmp_path / "bundle") as opened:
        manifest = opened.manifest
        names = opened.names("models")
    assert [variant.name for variant in manifest.variants] == ["fp32"]
    assert manifest.default_variant == "fp32"
    (left,) = manifest.left_out
    assert left.name == "fp16"
    assert "< 0.98" in left.reason
    assert 0 < left.metrics["held-out"]["map10"]["value"] < 0.6
    assert manifest.target.facts["compute_capabilities"] == ["8.7"]
    assert not any("fp16" in name for name in names)
    page = (tmp_path / "bundle" / "report.html").read_text().replace("&lt;", "<")
    assert f"<dt>fp16</dt><dd>{left.reason}</dd>" in page
    assert "edgeglm build --target jetson-orin-nano --recipe recipe.toml" in page
    assert said.json["left_out"] == {"fp16": left.reason}
    arguments = project.arguments("build", "jetson-orin-nano", "--threads", "1", *changed)
    words = project.edgeglm(*arguments, "--output", str(tmp_path / "bundle")).out
    assert f"left out fp16: {left.reason}" in words


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["--target", "jetson-agz"], "did you mean 'jetson-agx'?"),
        (["--target", "./none.toml"], "give the path of a TOML file"),
        (["--target", "cpu", "--recipe", "defualt"], "did you mean 'default'?"),
        (["--target", "cpu", "--recipe", "none.toml"], "give the path of a TOML file"),
        (["--target", "cpu", "--set", "student.sise=edge-xs"], "did you mean 'student.size'?"),
        (["--target", "cpu", "--set", "teacher.epochs=many"], "give teacher.epochs a value of that kind"),
        (["--target", "cpu", "--set", "teacher.epochs=0"], "give teacher.epochs a value of that kind"),
        (["--target", "cpu", "--set", "nonsense"], "write it as section.key=value"),
        (["--target", "cpu", "--set", "seed.x=1"], "write section.key=value"),
        (["--target", "cpu", "--set", "student.size=huge", "--dry-run"], "use one of those"),
        (["--target", "cpu", "--data", "absent", "--dry-run"], "give the folder that holds pairs.jsonl"),
        (["--target", "cpu", "--data", "nowhere"], "pairs.jsonl and the images"),
        (["--target", "cpu", "--data", "nowhere.parquet"], "make it (Parquet)"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_what_to_write(
    arguments: list[str], last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEGLM_OFFLINE", "1")
    said = Project(tmp_path, tmp_path / "store").edgeglm("build", *arguments)
    assert said.code == 2, said.err
    assert last in remedy(said)


@pytest.mark.parametrize(
    ("changed", "words", "last"),
    [
        ({"student.size": "edge-xl"}, "unknown student size 'edge-xl'", "did you mean"),
        (
            {"teacher.image": "[]"},
            "teacher.image: Expected `array` of length >= 1",
            "give teacher.image a value",
        ),
        ({"data.unseen_fraction": "0.0"}, "nothing could be evaluated", "raise data.unseen_fraction"),
        ({"teacher.text": "efficientnet-lite0"}, "efficientnet-lite0", "set EDGEGLM_STORE to a store that"),
        ({"teacher.image": '["/nowhere/vit"]'}, "/nowhere/vit", "give the path of one that exists"),
        ({"teacher.lora_targets": '["q_proj"]'}, "q_proj", "choose from"),
        ({"quantize.text_policy": "everything"}, "everything", "use one of those"),
    ],
)
def test_a_recipe_that_cannot_work_says_so(
    changed: dict[str, str],
    words: str,
    last: str,
    project: Project,
    cold: Said,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGEGLM_OFFLINE", "1")
    more = [part for key, value in changed.items() for part in ("--set", f"{key}={value}")]
    said = project.build("cpu", *more, output=tmp_path / "bundle")
    assert said.code == 2, said.err
    assert words in said.err
    assert last in remedy(said)
    assert not (tmp_path / "bundle").exists()


def _folder(project: Project, out: Path, lines: list[str]) -> Path:
    """Write a folder with the project's first pictures, one that is none, and these lines."""
    (out / "images").mkdir(parents=True)
    for name in ("red-circle", "red-square", "blue-ring"):
        picture = (project.root / "data" / "images" / f"{name}.png").read_bytes()
        (out / "images" / f"{name}.png").write_bytes(picture)
    (out / "images" / "torn.png").write_bytes(picture[: len(picture) // 2])
    (out / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return out


GOOD = '{"image": "images/red-circle.png", "text": "a red circle"}'


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ('{"image": "images/red-square.png", "text": ', "pairs.jsonl line 2"),
        ('{"image": "images/red-square.png"}', "1 usable pair"),
        ('{"image": "images/none.png", "text": "nothing"}', "images/none.png"),
        ('{"image": "images/torn.png", "text": "torn"}', "images/torn.png"),
        ('{"image": "images/red-square.png", "text": "  "}', "pairs.jsonl line 2: the caption is empty"),
        ('{"image": "../outside.png", "text": "out"}', "'../outside.png' climbs out"),
        ("", "1 usable pair"),
    ],
)
def test_bad_pairs_are_named_by_line_or_path(
    second: str, words: str, project: Project, tmp_path: Path
) -> None:
    folder = _folder(project, tmp_path / "own", [GOOD, second])
    said = project.build("cpu", "--data", str(folder), output=tmp_path / "bundle")
    assert said.code == 2, said.err
    assert words in said.err
    assert remedy(said).strip()
    assert not (tmp_path / "bundle").exists()


def test_skip_bad_leaves_bad_pairs_out_and_says_how_many(
    project: Project, cold: Said, tmp_path: Path
) -> None:
    lines = (project.root / "data" / "pairs.jsonl").read_text().splitlines()
    bad = [
        "{",
        '{"image": "images/none.png", "text": "nothing"}',
        '{"image": "images/torn.png", "text": "torn"}',
        '{"image": "images/red-circle.png", "text": ""}',
    ]
    folder = tmp_path / "own"
    _folder(project, folder, [*lines, *bad])
    for path in (project.root / "data" / "images").iterdir():
        (folder / "images" / path.name).write_bytes(path.read_bytes())
    arguments = project.arguments("build", "cpu", "--data", str(folder), "--skip-bad", "--threads", "1")
    gate = ("--set", "gates.teacher_map10=1.0", "--set", "teacher.lora_epochs=0")  # which ends it early
    said = project.edgeglm(*arguments, *gate, "--output", tmp_path / "bundle")
    assert said.code == 3, said.err
    assert "4 pairs left out" in said.err
    for reason in ("broken line", "missing image", "corrupt image", "empty caption"):
        assert reason in said.err


def test_a_folder_that_holds_something_else_is_left_as_it_is(
    project: Project, cold: Said, tmp_path: Path
) -> None:
    kept = tmp_path / "holiday" / "beach.jpg"
    kept.parent.mkdir()
    kept.write_bytes(b"sand")
    said = project.build("cpu", output=kept.parent)
    assert said.code == 2
    assert str(kept.parent) in said.err
    assert "choose another place" in remedy(said)
    assert kept.read_bytes() == b"sand"
    assert list(kept.parent.iterdir()) == [kept]


def test_an_output_folder_that_cannot_be_made_is_named(project: Project, cold: Said, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = project.build("cpu", output=tmp_path / "file" / "bundle")
    assert said.code == 2, said.err
    assert str(tmp_path / "file") in said.err


def test_a_store_that_cannot_be_written_is_named(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = Project(project.root, tmp_path / "file" / "store").build("cpu", output=tmp_path / "bundle")
    assert said.code == 2
    assert "set EDGEGLM_STORE to a folder that can be written" in remedy(said)


def test_a_dry_run_fetches_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEGLM_OFFLINE", "1")
    (tmp_path / "pairs.jsonl").touch()
    project = Project(tmp_path, tmp_path / "store")
    said = project.edgeglm(
        "build", "--target", "cpu", "--dry-run", "--json", "--skip-bad", "--data", str(tmp_path)
    )
    assert said.code == 0, said.err
    assert said.json["stages"][0] == "pairs"
    assert said.json["stages"][-2:] == ["compile", "pack"]
    recipe = said.json["recipe"]
    assert recipe["data"] == {**recipe["data"], "skip_bad": True, "source": "folder", "path": str(tmp_path)}
    assert recipe["gates"]["teacher_map10"] == 0.0, "the floor is that of the shipped data"
    assert not (tmp_path / "store").exists()
    assert json.loads(json.dumps(said.json)) == said.json


def test_a_target_that_takes_no_variant_stops_before_anything_is_delivered(
    project: Project, cold: Said, tmp_path: Path
) -> None:
    board = (files("edgeglm.targets") / "profiles" / "jetson-orin-nano.toml").read_text()
    board = re.sub(r"(?m)^name = .*$", 'name = "thimble"', board, count=1)
    board = re.sub(
        r"(?m)^memory_gb = .*$", 'memory_gb = { value = 0.0001, source = "made up" }', board, count=1
    )
    (tmp_path / "thimble.toml").write_text(board)
    more = ("--set", "quantize.candidates=[]")
    said = project.build(str(tmp_path / "thimble.toml"), *more, output=tmp_path / "bundle")
    assert said.code == 2, said.err
    assert "thimble takes none of fp32" in said.err
    assert remedy(said)
    assert not (tmp_path / "bundle").exists()


def test_a_parquet_file_of_the_same_pairs_builds_the_same_bundle(
    project: Project, cold: Said, bundle: Path, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = project.root / "data"
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = (data / row["image"]).read_bytes()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "own.parquet")
    said = project.build("cpu", "--data", str(tmp_path / "own.parquet"), output=tmp_path / "bundle")
    assert said.code == 0, said.err
    own, other = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "bundle", bundle))
    assert own["teacher"].keys() == other["teacher"].keys()


def test_a_disk_that_fills_up_loses_nothing_and_the_same_command_goes_on(
    project: Project, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount_small_disk(disk, "size=200k")
    try:
        small = Project(project.root, disk / "store")
        gate = ("--set", "gates.teacher_map10=1.0", "--set", "teacher.lora_epochs=0")  # which ends it early
        said = small.build("cpu", *gate, output=tmp_path / "bundle")
        assert said.code == 2, said.err
        assert "No space left on device" in said.err
        assert remedy(said)
        kept = small.stored()
        mount_small_disk(disk, "remount,size=200m")
        again = small.build("cpu", *gate, output=tmp_path / "bundle")
        assert again.code == 3, again.err
        assert kept < small.stored()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
