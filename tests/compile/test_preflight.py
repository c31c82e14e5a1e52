from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeglm.bundle.manifest import VariantRecord
from edgeglm.bundle.verify import open_bundle
from edgeglm.cli import main as cli
from edgeglm.compile.preflight import Subject, preflight, shapes_of, subjects_of, variant_subjects
from edgeglm.compile.trtexec import trtexec_arguments
from edgeglm.core.errors import UserError
from edgeglm.engines.plan import ShapeRange
from edgeglm.targets.costs import GraphCosts, GraphTensor, NodeCost, json_from_costs
from edgeglm.targets.roofline import floor_of, machine_of, node_floors
from edgeglm.targets.schema import known_targets, load_target
from scripts.fixtures.colours import colour_bundle

PIXELS = GraphTensor(name="pixels", dtype="float32", shape=("batch", 3, 80, 80))
COSTS = GraphCosts(
    opset=20,
    file_bytes=4_000_000,
    length=32,
    inputs=(PIXELS,),
    outputs=(),
    ops={"Conv": 3, "QuantizeLinear": 2},
    quantized=True,
    weight_bytes=4_000_000,
    io_bytes=80_000,
    live_bytes=1_000_000,
    nodes=(NodeCost(name="c", op="Conv", kind="matrix", precision="int8", flops=10**8),),
)


def subject(*, precision: str = "int8", lane: Any = "B", **changes: Any) -> Subject:
    costs = msgspec.structs.replace(COSTS, **changes)
    return Subject(
        name="int8 image", precision=precision, lane=lane, costs=costs, file="models/int8/image.onnx"
    )


def refusal(one: Subject, target: str) -> str:
    (reason,) = preflight(one, load_target(target)).refusals
    return reason


def test_what_fits_is_told_with_its_floor():
    result = preflight(subject(), load_target("jetson-agx-orin-64gb"), batches=(8,))
    assert result.ok
    assert [check.what for check in result.checks] == [
        "precision", "lane", "opset", "typing", "shapes", "memory",
    ]  # fmt: skip
    assert result.floors[0].batch == 8
    assert result.floors[0].floor_ms > 0


@pytest.mark.parametrize(
    ("one", "target", "words"),
    [
        (subject(precision="fp8"), "jetson-orin-nano", "no FP8 tensor cores, which begin with Ada"),
        (subject(precision="fp32"), "t4", "TensorRT-RTX does not support FP32 GEMM on SM 7.5"),
        (subject(opset=24), "jetson-agx-orin-64gb", "parses opsets up to 20, not 24; export with opset 20"),
        (subject(quantized=False), "jetson-orin-nano", "takes INT8 from Q/DQ nodes only"),
        (subject(file_bytes=3 * 10**9), "jetson-orin-nano", "has 8 GB, building needs 12.31 GB"),
        (
            subject(ops={"com.microsoft.FusedConv": 1}),
            "jetson-orin-nano",
            "TensorRT knows no com.microsoft.FusedConv",
        ),
        (
            subject(lane="A", opset=16, ops={"LayerNormalization": 1}),
            "jetson-agx-xavier",
            "TensorRT 8.5, the last for jetson-agx-xavier, has no LayerNormalization; lower the graph",
        ),
        (
            subject(inputs=(GraphTensor(name="pixels", dtype="float32", shape=("b", 3, "h", 80)),)),
            "jetson-orin-nano",
            "pixels is dynamic along axis 2",
        ),
    ],
)
def test_a_refusal_names_the_fact_and_a_way_out(one: Subject, target: str, words: str):
    reason = refusal(one, target)
    assert words in reason
    assert ";" in reason, "the remedy is the last clause"


def test_the_worst_member_of_a_family_decides():
    assert "jetson-agx-xavier has tensorrt 8.5.2, which does not take lane B" in refusal(
        subject(), "jetson-agx"
    )
    assert len(preflight(subject(), load_target("jetson-agx")).floors) == 4


def test_a_cpu_takes_what_no_tensorrt_parses():
    assert preflight(subject(quantized=False, ops={"com.microsoft.X": 1}), load_target("cpu")).ok


def test_dynamic_inputs_become_ranges_and_fixed_ones_none():
    tokens = GraphTensor(name="ids", dtype="int64", shape=("b", "l"))
    fixed = GraphTensor(name="fixed", dtype="float32", shape=(1, 4))
    shapes = shapes_of(msgspec.structs.replace(COSTS, inputs=(PIXELS, tokens, fixed)))
    assert shapes == {
        "pixels": ShapeRange(min=(1, 3, 80, 80), opt=(8, 3, 80, 80), max=(32, 3, 80, 80)),
        "ids": ShapeRange(min=(1, 1), opt=(8, 16), max=(32, 32)),
    }


def runtime(target: str, version: str) -> Any:
    return next(r for r in load_target(target).runtimes if r.version == version)


def test_a_person_can_build_by_hand_on_each_release():
    profile = {"x": ShapeRange(min=(1, 2), opt=(8, 2), max=(32, 2))}
    new = trtexec_arguments(
        "m.onnx", "m.plan", profile=profile, precision="int8", runtime=runtime("jetson-orin-nano", "10.3.0")
    )
    assert new[1:] == [
        "--onnx=m.onnx", "--saveEngine=m.plan", "--minShapes=x:1x2", "--optShapes=x:8x2",
        "--maxShapes=x:32x2", "--stronglyTyped", "--skipInference",
    ]  # fmt: skip
    old = trtexec_arguments(
        "m.onnx", "m.plan", profile={}, precision="int8", runtime=runtime("jetson-agx-xavier", "8.5.2")
    )
    assert old[3:] == ["--fp16", "--int8", "--precisionConstraints=obey", "--buildOnly"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    parts: dict[str, Path | bytes] = {
        f"costs/{variant}-{tower}.json": json_from_costs(
            msgspec.structs.replace(COSTS, quantized=variant == "int8")
        )
        for variant in ("fp32", "int8")
        for tower in ("image", "text")
    }
    return colour_bundle(tmp_path / "demo", **parts)


def test_a_device_judges_a_bundle_without_onnx(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with open_bundle(bundle) as opened:
        subjects = subjects_of(opened)
    assert [one.name for one in subjects] == ["fp32 image", "fp32 text", "int8 image", "int8 text"]


def test_a_bundle_without_costs_says_what_to_do(tmp_path: Path):
    with (
        open_bundle(colour_bundle(tmp_path / "demo")) as opened,
        pytest.raises(UserError, match="carries no"),
    ):
        subjects_of(opened)


def test_all_targets_are_judged_without_a_library_that_takes_long_to_import(bundle: Path, capsys):
    """To reach: all targets under 2 s, from the start of Python (scripts/bench/verify.py times it)."""
    command = (
        "import sys; from edgeglm.cli.main import exit_code; code = exit_code(sys.argv[1:]); "
        "slow = {'numpy', 'onnx', 'onnxruntime', 'tokenizers', 'tensorrt', 'tensorrt_rtx', 'torch'}; "
        "sys.exit(code or sorted(slow & sys.modules.keys()) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, "plan", str(bundle), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {one["target"] for one in json.loads(done.stdout)["preflight"]} == set(known_targets())


def test_the_matrix_shows_each_target_once(bundle: Path, capsys):
    assert cli.exit_code(["plan", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (t4,) = [line.split() for line in lines if line.startswith(" t4 ") or line.startswith("t4 ")]
    assert t4[1:5] == ["no", "precision", "no", "precision"]
    (family,) = [line for line in lines if line.strip().startswith("jetson-agx ")]
    assert family.count("3 of 4") == 4, "a family's boards take different lanes: one refusal is not all"


def test_plan_exits_with_2_when_nothing_fits_and_prints_whole_commands(bundle: Path, capsys):
    assert cli.exit_code(["plan", str(bundle), "--target", "jetson-agx-xavier"]) == 2
    assert "jetson-agx-xavier takes none of fp32, int8" in capsys.readouterr().err
    assert cli.exit_code(["plan", str(bundle), "--target", "jetson-orin-nano", "--trtexec"]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if "bin/trtexec" in line]
    assert len(commands) == 2 * 4, "10.3 and 10.16, two variants, two towers"
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "/usr/src/tensorrt/bin/trtexec"
        assert "--stronglyTyped" in words


def test_floors_and_memory_are_told_for_every_target_and_batch(bundle: Path, capsys):
    assert cli.exit_code(["plan", str(bundle), "--json", "--batch", "1", "--batch", "16"]) == 0
    for one in json.loads(capsys.readouterr().out)["preflight"]:
        members = load_target(one["target"]).members or (one["target"],)
        assert [floor["batch"] for floor in one["floors"]] == [1, 16] * len(members)
        few, many = one["memory"][:2]
        assert (few["batch"], many["batch"]) == (1, 16)
        assert many["run"] - few["run"] == 15 * COSTS.live_bytes
        assert (few["build"] > 0) == (one["target"] != "cpu")
    assert cli.exit_code(["plan", str(bundle)]) == 0
    table = capsys.readouterr().out
    assert "batch 1 8 32" in table
    (row,) = [line.split() for line in table.splitlines() if line.split()[:2] == ["int8", "image"]]
    assert row[2:] == ["331", "324", "331", "355"], "to build, to run 1, 8 and 32, in MB"


def test_plan_shows_which_nodes_take_the_time(bundle: Path, capsys):
    assert cli.exit_code(["plan", str(bundle), "--nodes"]) == 2
    assert "name it with --target" in capsys.readouterr().err
    orin = ["plan", str(bundle), "--target", "jetson-agx-orin-64gb", "--nodes"]
    assert cli.exit_code(orin) == 0
    assert (
        "int8 image, batch 1, on jetson-agx-orin-64gb: 1 of 1 nodes, each by itself"
        in capsys.readouterr().out
    )
    assert cli.exit_code([*orin, "--json", "--batch", "8"]) == 0
    (node,) = json.loads(capsys.readouterr().out)["nodes"][0]["nodes"]
    assert (node["name"], node["op"], node["flops"], node["binding"]) == ("c", "Conv", 8 * 10**8, "compute")


def test_the_nodes_of_a_graph_sum_up_to_what_it_takes_unfused():
    machine = machine_of(load_target("jetson-agx-orin-64gb"))
    wide = msgspec.structs.replace(
        COSTS,
        nodes=(*COSTS.nodes, NodeCost(name="r", op="Relu", bytes=10**6, bytes_fixed=10**3, weight_bytes=10)),
    )
    nodes = node_floors(wide, machine, 8)
    assert [node.binding for node in nodes] == ["compute", "bandwidth"]
    assert nodes[1].bytes == 8 * 10**6 + 10**3 + 10
    assert nodes[1].precision == ""
    assert sum(node.floor_ms for node in nodes) == pytest.approx(floor_of(wide, machine, 8).unfused_ms)


def test_every_board_of_a_family_says_what_its_dla_takes(bundle: Path, capsys):
    assert cli.exit_code(["plan", "--target", "jetson-agx", "--dla"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DLA")]
    assert [line.split()[1] for line in said] == list(load_target("jetson-agx").members)
    cli.exit_code(["plan", str(bundle), "--target", "jetson-agx", "--dla"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DLA int8 image:")]
    assert len(said) == len(load_target("jetson-agx").members)


def test_plan_draws_the_roofs_of_all_boards(bundle: Path, tmp_path: Path, capsys):
    place = tmp_path / "roofs.svg"
    assert cli.exit_code(["plan", str(bundle), "--plot", str(place)]) == 0
    assert "t4 (dashed): 320 GB/s" in place.read_text()
    assert cli.exit_code(["plan", str(bundle), "--plot", str(tmp_path / "none/roofs.svg")]) == 2
    assert cli.exit_code(["plan", "--plot", str(place)]) == 2
    assert "give a bundle or an .onnx file" in capsys.readouterr().err


def test_plan_alone_says_which_precisions_a_target_takes(capsys):
    assert cli.exit_code(["plan", "--target", "jetson-orin-nano"]) == 0
    assert "no FP8 tensor cores" in capsys.readouterr().out
    assert cli.exit_code(["plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precisions"]["t4"]["fp32"]["ok"] is False


def test_a_family_is_asked_board_by_board_and_refused_for_the_one_that_takes_nothing(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.exit_code(["plan", str(bundle), "--target", "jetson-agx", "--json"]) == 2
    said = capsys.readouterr()
    assert "jetson-agx-xavier takes none of" in said.err
    boards = json.loads(said.out)["boards"]
    fitting = {fit["member"] for fit in boards if fit["fits"]}
    assert fitting == {"jetson-agx-orin-32gb", "jetson-agx-orin-64gb", "jetson-agx-thor"}
    assert all(fit["refusals"] for fit in boards if not fit["fits"])


def test_a_tower_that_stayed_fp16_in_an_int8_variant_is_judged_as_what_it_is() -> None:
    nodes = (NodeCost(name="c", op="Conv", kind="matrix", precision="fp16", flops=10**8),)
    plain = msgspec.structs.replace(COSTS, ops={"Conv": 3}, quantized=False, nodes=nodes)
    variant = VariantRecord(name="int8", files={"image": "models/int8/image.onnx"}, gate="passed")
    for costs, precision in ((plain, "fp16"), (COSTS, "int8")):
        (one,) = variant_subjects(variant, {"costs/int8-image.json": costs}.__getitem__)
        assert one.precision == precision
        assert preflight(one, load_target("jetson-agx-orin-64gb")).ok
