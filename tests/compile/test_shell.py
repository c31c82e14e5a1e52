"""The shell finalize, run by a real POSIX shell: what it builds, and of what."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeglm.bundle.goldens import LEAST_AGREEMENT, LEAST_COSINE
from edgeglm.bundle.verify import open_bundle
from edgeglm.compile.contract import target_of
from edgeglm.compile.device_engines import sweep
from edgeglm.compile.lane_record import pinned_nodes
from edgeglm.compile.shell import shell_sources
from edgeglm.compile.trtexec import trtexec_arguments
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import EngineConfig
from edgeglm.engines.plan import ShapeRange
from edgeglm.targets.schema import RuntimeVersion
from scripts.fixtures.colours import COLOURS
from tests.compile.shell_board import ORIN, XAVIER, board, receipt_of, run, with_shell
from tests.compile.stand_ins import made


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_a_xavier_builds_lane_a_with_its_flags_and_keeps_the_faster(
    shell: str, tmp_path: Path, require_system: Callable[[str], str]
):
    bundle, root = with_shell(tmp_path, lane="A"), board(tmp_path / "root", XAVIER)
    found = require_system(shell)
    done = run(bundle, root, shell=found)
    assert done.returncode == 0, done.stderr + done.stdout
    receipt = receipt_of(bundle)
    assert (receipt["chosen"], receipt["lane"], receipt["library_version"]) == ("int8", "A", "8.5.2")
    facts = {name: receipt["board"][name] for name in ("model", "sm", "l4t", "power_mode")}
    assert facts == {"model": "A tegra194 board", "sm": "72", "l4t": "35.4.1", "power_mode": "mode 0"}
    assert [c["status"] for c in receipt["candidates"]] == ["passed", "passed"]
    assert all(t["worst_cosine"] == 1.0 for c in receipt["candidates"] for t in c["towers"].values())
    agreed = {
        c["variant"]: [t["top_k_agreement"] for t in c["towers"].values()] for c in receipt["candidates"]
    }
    assert agreed == {"int8": [1.0, 1.0], "fp16": [None, None]}, "the bundle has a gallery of one of them"
    builds = [line for line in (root / "calls").read_text().splitlines() if "--saveEngine" in line]
    assert len(builds) == 4
    assert all("--fp16" in line and "--buildOnly" in line for line in builds)
    assert ["--int8 --precisionConstraints=obey" in line for line in builds] == [True, True, False, False]
    (text, *_) = [
        line for line in (root / "calls").read_text().splitlines() if "--loadInputs=input_ids" in line
    ]
    assert "shell/input_ids.int32.bin" in text, "TensorRT 8.5 has no 64-bit inputs"


def test_a_board_without_python_asks_as_much_of_its_golden_outputs_as_one_with(tmp_path: Path):
    with open_bundle(with_shell(tmp_path, lane="A")) as opened:
        script = opened.file("finalize.sh").read_text()
    assert f"\nleast_cosine={LEAST_COSINE}\nleast_agreement={LEAST_AGREEMENT}\n" in script


def test_a_xavier_keeps_the_steps_of_a_normalization_in_fp32(tmp_path: Path):
    nodes = ("norm/LayerNormalization/Pow", "norm/LayerNormalization/Div")
    bundle, root = with_shell(tmp_path, lane="A", fp32_nodes=nodes), board(tmp_path / "root", XAVIER)
    done = run(bundle, root)
    assert done.returncode == 0, done.stderr + done.stdout
    builds = [line for line in (root / "calls").read_text().splitlines() if "--saveEngine" in line]
    pairs = ",".join(f"{name}:fp32" for name in nodes)
    told = f"--precisionConstraints=obey --layerPrecisions={pairs} --layerOutputTypes={pairs}"
    assert [told in line for line in builds] == ["/models/fp16/text.onnx" in line for line in builds]
    assert sum(told in line for line in builds) == 1


@pytest.mark.parametrize(
    ("lane", "facts", "version"), [("A", XAVIER, "8.5.2"), ("B", ORIN, "10.3.0")], ids=["xavier", "orin"]
)
def test_what_a_person_is_told_to_type_is_what_the_script_runs(
    lane: Any, facts: tuple[str, str, str], version: str, tmp_path: Path
):
    nodes = ("norm/LayerNormalization/Pow", "norm/LayerNormalization/Div")
    bundle = with_shell(tmp_path, lane=lane, fp32_nodes=nodes, quantized=("text",))
    root = board(tmp_path / "root", facts)
    assert run(bundle, root).returncode == 0
    builds = [line.split() for line in (root / "calls").read_text().splitlines() if "--saveEngine" in line]
    runtime = RuntimeVersion(library="tensorrt", version=version, lane=lane, source="the test")
    pixels = {"pixels": ShapeRange(min=(1, 3, 4, 4), opt=(8, 3, 4, 4), max=(32, 3, 4, 4))}
    tokens = ShapeRange(min=(1, 1), opt=(8, 2), max=(32, 5))
    profiles = {"image": pixels, "text": {"input_ids": tokens, "attention_mask": tokens}}
    with open_bundle(bundle) as opened:
        variants = {variant.name: variant for variant in opened.manifest.variants}
        pins = {name: pinned_nodes(opened, variant) for name, variant in variants.items()}
    assert len(builds) == 4
    for words in builds:
        onnx_path, plan, *flags = words
        variant, tower = Path(onnx_path).parent.name, Path(onnx_path).stem
        told = trtexec_arguments(
            onnx_path.partition("=")[2],
            plan.partition("=")[2],
            profile=profiles[tower],
            precision="int8" if (variant, tower) == ("int8", "text") else "fp16",
            runtime=runtime,
            fp32_nodes=pins[variant].get(f"models/{variant}/{tower}.onnx", ()),
            timing_cache=next(f.partition("=")[2] for f in flags if f.startswith("--timingCacheFile=")),
        )
        assert told[1:3] == [onnx_path, plan]
        assert sorted(told[3:]) == sorted(flags)
    assert ("--layerPrecisions" in (root / "calls").read_text()) == (lane == "A")


def test_a_tower_that_stayed_in_fp16_is_not_built_on_ranges_that_trtexec_makes_up(tmp_path: Path):
    bundle, root = with_shell(tmp_path, lane="A", quantized=("text",)), board(tmp_path / "root", XAVIER)
    done = run(bundle, root)
    assert done.returncode == 0, done.stderr + done.stdout
    builds = [line for line in (root / "calls").read_text().splitlines() if "--saveEngine" in line]
    assert [line.split("/models/")[1].split()[0] for line in builds if "--int8" in line] == ["int8/text.onnx"]


def test_a_machine_that_is_no_board_or_has_no_trtexec_gets_one_line(tmp_path: Path):
    bundle, nothing = with_shell(tmp_path), tmp_path / "nothing"
    nothing.mkdir()
    laptop = run(bundle, nothing)
    assert (laptop.returncode, laptop.stderr.count("\n")) == (2, 1), laptop.stderr
    assert laptop.stderr.startswith("error: this is unknown (SM none)")
    root = board(tmp_path / "root", ORIN)
    (root / "usr/src/tensorrt/bin/trtexec").rename(tmp_path / "trtexec")
    absent = run(bundle, root)
    assert (absent.returncode, absent.stderr.count("\n")) == (2, 1), absent.stderr
    assert "libnvinfer-bin" in absent.stderr
    assert run(bundle, root, "--trtexec", str(tmp_path / "trtexec")).returncode == 0
    asked = run(bundle, root, "--help")
    assert (asked.returncode, "sh finalize.sh [--any-board]" in asked.stdout) == (0, True)


def test_an_orin_builds_lane_b_strongly_typed(tmp_path: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    assert run(bundle, root).returncode == 0
    calls = (root / "calls").read_text()
    assert "--stronglyTyped --skipInference" in calls
    assert "--fp16" not in calls
    assert "--minShapes=input_ids:1x1,attention_mask:1x1" in calls
    assert "--maxShapes=pixels:32x3x4x4" in calls


def test_what_a_recipe_asks_of_the_builder_is_what_trtexec_is_told(tmp_path: Path):
    asked = EngineConfig(refit=True, workspace_bytes=64 << 20, usual_batch=4, largest_batch=64)
    bundle, root = with_shell(tmp_path, engine=asked), board(tmp_path / "root", ORIN)
    done = run(bundle, root)
    assert done.returncode == 0, done.stderr
    builds = [line for line in (root / "calls").read_text().splitlines() if "--saveEngine" in line]
    assert len(builds) == 4
    assert all("--stronglyTyped --refit --memPoolSize=workspace:64 --skipInference" in b for b in builds)
    assert all("=pixels:4x3x4x4 " in b or "=input_ids:4x2,attention_mask:4x2 " in b for b in builds)
    assert all("=pixels:64x3x4x4 " in b or "=input_ids:64x5,attention_mask:64x5 " in b for b in builds)
    plain = with_shell(tmp_path / "plain")
    assert run(plain, root).returncode == 0
    assert "--refit" not in (root / "calls").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (EngineConfig(version_compatible=True), "--versionCompatible"),
        (EngineConfig(weight_streaming=True), "--weightStreamingBudget=-1"),
    ],
    ids=["version-compatible", "weight-streaming"],
)
def test_an_engine_is_loaded_as_it_was_built(asked: EngineConfig, told: str, tmp_path: Path):
    """Without the flag trtexec refuses the plan, or keeps all weights on the GPU."""
    bundle, root = with_shell(tmp_path, engine=asked), board(tmp_path / "root", ORIN)
    done = run(bundle, root)
    assert done.returncode == 0, done.stderr
    assert [c["status"] for c in receipt_of(bundle)["candidates"]] == ["passed", "passed"]
    loads = [line for line in (root / "calls").read_text().splitlines() if "--loadEngine" in line]
    assert len(loads) == 8
    assert all(told in line for line in loads)


def test_a_release_that_lacks_what_is_asked_says_so_before_it_builds(tmp_path: Path):
    bundle = with_shell(tmp_path, lane="A", engine=EngineConfig(weight_streaming=True))
    done = run(bundle, board(tmp_path / "root", XAVIER))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "weight_streaming begins with TensorRT 10.0" in done.stderr
    assert not (tmp_path / "root/calls").exists()


def test_each_board_of_a_family_gets_its_own_options(tmp_path: Path):
    bundle, facts = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    script = bundle / "finalize.sh"
    script.chmod(0o644)
    lines = "87 40000000 B ok 8 32 --large\n87 6000000 B ok 8 32 --middle\n87 3000000 B ok 8 32 --small"
    head, rest = script.read_text().split("options() {\n  cat <<'END'\n")
    script.write_text(f"{head}options() {{\n  cat <<'END'\n{lines}\nEND{rest.split('END', 1)[1]}")
    for kilobytes, flag in ((64_000_000, "--large"), (8_000_000, "--middle"), (2_000_000, "--small")):
        (facts / "proc/meminfo").write_text(f"MemTotal: {kilobytes} kB\nMemAvailable: 1000000 kB\n")
        (facts / "calls").unlink(missing_ok=True)
        assert run(bundle, facts).returncode == 0
        builds = [line for line in (facts / "calls").read_text().splitlines() if "--saveEngine" in line]
        assert builds
        assert all(flag in line for line in builds)


def test_engines_are_used_again_until_they_rot(tmp_path: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    assert run(bundle, root).returncode == 0
    (root / "calls").unlink()
    assert run(bundle, root).returncode == 0
    assert "--saveEngine" not in (root / "calls").read_text()
    engines = sorted(bundle.with_name("demo.finalized").glob("engines/*/engine.plan"))
    assert len(engines) == 4
    engines[0].write_text("rotten")
    assert run(bundle, root).returncode == 0
    assert (root / "calls").read_text().count("--saveEngine") == 1


def test_each_file_has_a_timing_cache_and_a_foreign_one_is_started_afresh(tmp_path: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    assert run(bundle, root).returncode == 0
    out = bundle.with_name("demo.finalized")
    caches = sorted((out / "timing").iterdir())
    assert [path.name[64:] for path in caches] == ["-10.3.0-87.cache"] * 4
    shutil.rmtree(out / "engines")
    caches[0].write_text("foreign")
    (root / "calls").unlink()
    assert run(bundle, root).returncode == 0
    assert (root / "calls").read_text().count("--saveEngine") == 5, "one was built again without its cache"
    assert [path.read_text() for path in caches] == ["timed\n", *["timed\ntimed\n"] * 3]


def test_engines_of_edgeglm_and_of_the_script_do_not_sweep_each_other(tmp_path: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    engines = bundle.with_name("demo.finalized") / "engines"
    (engines / "edgeglms").mkdir(parents=True)
    (engines / "edgeglms/engine.json").write_text("{}")
    assert run(bundle, root).returncode == 0
    assert len(list(engines.iterdir())) == 5
    sweep(engines, {})
    assert len(list(engines.iterdir())) == 4


def test_a_link_to_a_bundle_shares_the_engines_of_the_bundle_that_it_names(
    tmp_path: Path, require_system: Callable[[str], str]
):
    bundle, root = with_shell(tmp_path, lane="B"), board(tmp_path / "root", ORIN)
    link = bundle.with_name("current")
    link.symlink_to(bundle.name)
    for shell in ("dash", "busybox"):
        done = run(link, root, shell=require_system(shell))
        assert done.returncode == 0, done.stderr + done.stdout
    assert receipt_of(bundle)["chosen"] == "int8"
    assert not link.with_name("current.finalized").exists()


def test_a_candidate_that_answers_otherwise_or_fails_is_left(tmp_path: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    assert run(bundle, root, wrong="int8").returncode == 0
    assert receipt_of(bundle)["chosen"] == "fp16"
    shutil.rmtree(bundle.with_name("demo.finalized"))
    assert run(bundle, root, fails="int8").returncode == 0
    statuses = {c["variant"]: c["status"] for c in receipt_of(bundle)["candidates"]}
    assert statuses["int8"].startswith("trtexec failed, see ")
    assert statuses["fp16"] == "passed"
    assert "node odd" in (bundle.with_name("demo.finalized") / "last.log").read_text()
    shutil.rmtree(bundle.with_name("demo.finalized"))
    nothing = run(bundle, root, fails=".onnx")
    assert nothing.returncode == 1
    assert "mend what" in nothing.stderr
    assert not (bundle.with_name("demo.finalized") / "receipt-trtexec.json").exists()


def test_the_bundle_with_the_script_verifies_and_holds_what_the_board_lacks(tmp_path: Path):
    bundle = with_shell(tmp_path)
    with open_bundle(bundle) as opened:
        pixels = np.frombuffer(opened.file("shell/pixels.bin").read_bytes(), "<f4").reshape(2, 3, 4, 4)
        assert pixels[0, :, 0, 0].tolist() == pytest.approx([channel / 255 for channel in COLOURS["red"]])
        assert opened.file("shell/int8-text.txt").read_text().split()[0] == "3"
        assert "@" not in opened.file("finalize.sh").read_text().split("# ----")[0].split("wrote in")[1]


def test_a_target_without_a_jetson_needs_no_script(tmp_path: Path):
    path = made(tmp_path / "demo", "t4")
    with open_bundle(path) as bundle, pytest.raises(UserError, match="has no Jetson among its members"):
        shell_sources(bundle, target_of(bundle))
