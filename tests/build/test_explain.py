"""If these fail, `edgeglm explain` sends a user after the wrong change."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.build.conftest import Project, Said
from tests.tiny_towers import RECIPE


def states(said: Said) -> dict[str, str]:
    assert said.code == 0, said.err
    return {entry["stage"]: entry["state"] for entry in said.json}


def reasons(said: Said) -> dict[str, list[str]]:
    return {entry["stage"]: entry["reasons"] for entry in said.json if entry["reasons"]}


def test_after_a_build_everything_would_be_reused(project: Project, cold: Said) -> None:
    said = project.edgeglm(*project.arguments("explain", "cpu", "--json"))
    assert set(states(said).values()) == {"reused"}
    assert reasons(said) == {}


def test_a_changed_key_is_named_with_both_values(project: Project, cold: Said) -> None:
    said = project.edgeglm(*project.arguments("explain", "cpu", "--json", "--set", "teacher.epochs=2"))
    found = states(said)
    assert [stage for stage, state in found.items() if state == "reused"] == [
        "pairs",
        "backbones",
        "features",
    ]
    assert [stage for stage, state in found.items() if state == "runs"] == ["teacher"]
    assert reasons(said)["teacher"] == ["config.epochs: 1 -> 2"]
    assert reasons(said)["targets"] == ["after teacher"]
    again = project.edgeglm(*project.arguments("explain", "cpu", "--json"))
    assert set(states(again).values()) == {"reused"}, "to explain changes nothing"


def test_a_key_of_one_tower_trains_that_tower_alone(project: Project, cold: Said) -> None:
    said = project.edgeglm(*project.arguments("explain", "cpu", "--json", "--set", "student.text_epochs=2"))
    found = states(said)
    assert [stage for stage, state in found.items() if state == "runs"] == ["distil-text"]
    assert found["distil-image"] == "reused"
    assert "distil-text" in reasons(said)["export"][0]


def test_a_changed_target_reaches_compile_and_pack_alone(project: Project, cold: Said) -> None:
    said = project.edgeglm(*project.arguments("explain", "jetson-orin-nx", "--json"))
    found = states(said)
    # On a CPU an INT8 graph computes in FP32 besides and is made for its instructions, on a GPU in FP16.
    assert {stage for stage, state in found.items() if state != "reused"} <= {
        "quantize",
        "latency",
        "compile",
        "pack",
    }
    if found["quantize"] == "runs":
        changed = reasons(said)["quantize"]
        assert "config.high_precision: fp32 -> fp16" in changed
        # Students that must learn to be rounded learn it to the bits of the machine's own schemes. What is
        # compared with may be the build of another test, with as many samples as that one asked for.
        known = ("config.high_precision: ", "config.schemes.", "config.tuning.weight_bits: ",
                 "config.quantize.calibration_samples: ")  # fmt: skip
        assert all(reason.startswith(known) for reason in changed)
    else:
        assert reasons(said)["compile"] == ["never made with this recipe"]


def test_a_changed_caption_is_traced_to_the_data(project: Project, cold: Said, tmp_path: Path) -> None:
    shutil.copytree(project.root / "data", tmp_path / "data")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(root=project.root))
    moved = Project(tmp_path, project.store)
    assert set(states(moved.edgeglm(*moved.arguments("explain", "cpu", "--json"))).values()) == {"reused"}
    file = tmp_path / "data" / "pairs.jsonl"
    file.write_text(file.read_text().replace("a red circle", "a crimson circle"))
    said = moved.edgeglm(*moved.arguments("explain", "cpu", "--json"))
    assert states(said)["pairs"] == "runs"
    (why,) = reasons(said)["pairs"]
    assert why.startswith("inputs.own: ")
    assert reasons(said)["features"] == ["after pairs"]


def test_an_emptied_store_is_told_from_a_change(project: Project, cold: Said, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(project.store / "history", store / "history")
    said = Project(project.root, store).edgeglm(*project.arguments("explain", "cpu", "--json"))
    assert states(said)["pairs"] == "runs"
    assert reasons(said)["pairs"] == ["its artifact left the store"]


def test_the_table_shows_the_time_that_a_reused_stage_took(project: Project, cold: Said) -> None:
    lines = project.edgeglm(*project.arguments("explain", "cpu")).out.splitlines()
    assert any("teacher" in line and "reused" in line and "took" in line for line in lines)


def test_nothing_is_downloaded_to_explain(tmp_path: Path) -> None:
    said = Project(tmp_path, tmp_path / "store").edgeglm("explain", "--target", "t4", "--json")
    assert set(states(said).values()) == {"waits"}
    assert any("noto" in reason for reason in reasons(said)["pairs"])
    assert reasons(said)["backbones"] == ["not downloaded yet: efficientnet-lite0"]
    assert not list(tmp_path.rglob("entry.json"))
