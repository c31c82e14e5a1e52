"""The shell finalize, run by a real POSIX shell; the board's files and its trtexec are stand-ins."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.compile.device_engines import sweep
from edgeglm.compile.lane_record import LaneRecord, LaneTower, pinned_nodes
from edgeglm.compile.route import target_of
from edgeglm.compile.shell import shell_sources, write_with_shell
from edgeglm.compile.trtexec import trtexec_arguments
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import EngineConfig
from edgeglm.engines.plan import ShapeRange
from edgeglm.engines.power import Energy
from edgeglm.targets.schema import RuntimeVersion, load_target, resolve_target, toml_from_resolved
from tests.cli.test_bundle_commands import colour_tower
from tests.compile.test_finalize import made
from tests.compile.test_triton import described
from tests.runtime.test_retrieval import COLOURS

# It 'builds' by writing down which model it was given, and 'runs' by telling what is expected of it.
TRTEXEC = r"""#!/bin/sh
echo "$@" >>"$STUB_CALLS"
for argument in "$@"; do
  case "$argument" in
    --onnx=*) onnx="${argument#*=}" ;;
    --saveEngine=*) plan="${argument#*=}" ;;
    --loadEngine=*) loaded="${argument#*=}" ;;
    --exportOutput=*) output="${argument#*=}" ;;
    --timingCacheFile=*) cache="${argument#*=}" ;;
  esac
done
if [ -n "$plan" ]; then
  case "$onnx" in *"$STUB_FAILS"*) [ -z "$STUB_FAILS" ] || { echo "Error: node odd"; exit 1; } ;; esac
  if grep -q foreign "$cache" 2>/dev/null; then echo "Error: timing cache"; exit 1; fi
  echo timed >>"$cache"
  echo "$onnx" >"$plan"
  exit 0
fi
onnx="$(cat "$loaded")"
variant="$(basename "$(dirname "$onnx")")" tower="$(basename "$onnx" .onnx)"
if [ -n "$output" ]; then
  sign=; [ "$variant" = "$STUB_WRONG" ] && sign=-
  values="$(tail -n +2 "$STUB_BUNDLE/shell/$variant-$tower.txt" | sed "s/^/$sign/; s/--//" | paste -sd, -)"
  printf '[\n  { "name" : "embedding"\n  , "dimensions" : "2x3"\n' >"$output"
  printf '  , "values" : [ %s ]\n  }\n]\n' "$values" >>"$output"
fi
[ "$variant" = int8 ] && took=1.25 || took=2.5
echo "[I] Latency: min = 0.9 ms, max = 3 ms, mean = 1.3 ms, median = $took ms, percentile(90%) = 2 ms"
"""

XAVIER = (
    "tegra194",
    "# R35 (release), REVISION: 4.1, GCID: 1",
    "libnvinfer8\nStatus: install ok installed\nVersion: 8.5.2-1+cuda11.4\n",
)
ORIN = (
    "tegra234",
    "# R36 (release), REVISION: 4.3, GCID: 1",
    # What an upgrade left in the list comes first and counts for nothing.
    "libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.5.2-1\n\n"
    "Package: libnvinfer10\nStatus: install ok installed\nVersion: 10.3.0.30-1\n",
)


def board(folder: Path, facts: tuple[str, str, str], *, free_kb: int = 8_000_000) -> Path:
    chip, release, packages = facts
    for name, text in {
        "proc/device-tree/compatible": f"nvidia,board\0nvidia,{chip}\0",
        "proc/device-tree/model": f"A {chip} board\0",
        "proc/meminfo": f"MemTotal: 9000000 kB\nMemAvailable: {free_kb} kB\n",
        "etc/nv_tegra_release": release + "\n",
        "var/lib/dpkg/status": "Package: libnvinfer-bin\nStatus: install ok installed\n"
        f"Version: 1.1.1\n\nPackage: {packages}",
        "var/lib/nvpmodel/status": "pmode:0000",
        "usr/src/tensorrt/bin/trtexec": TRTEXEC,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "usr/src/tensorrt/bin/trtexec").chmod(0o755)
    return folder


def with_qdq(model: bytes) -> bytes:
    """Return the model with a Q/DQ pair that nothing reads: whether there is one is what is asked."""
    made = onnx.load_model_from_string(model)
    made.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.array(1, np.float32), "q.scale"),
            onnx.numpy_helper.from_array(np.array(0, np.int8), "q.zero"),
        ]
    )
    made.graph.node.extend(
        [
            onnx.helper.make_node("QuantizeLinear", ["q.scale", "q.scale", "q.zero"], ["q.narrow"]),
            onnx.helper.make_node("DequantizeLinear", ["q.narrow", "q.scale", "q.zero"], ["q.wide"]),
        ]
    )
    return bytes(made.SerializeToString())


def with_shell(
    tmp_path: Path,
    *,
    lane: str = "B",
    target: str = "jetson-agx",
    fp32_nodes: tuple[str, ...] = (),
    quantized: tuple[str, ...] = ("image", "text"),
    engine: EngineConfig | None = None,
) -> Path:
    plain = described(tmp_path / "described", made(tmp_path / "plain", target))
    with open_bundle(plain) as bundle:
        resolved = resolve_target(load_target(target), engine)
        variants = (
            *bundle.manifest.variants,
            msgspec.structs.replace(bundle.manifest.variants[0], name="fp16", gate="passed"),
        )
        variants = tuple(msgspec.structs.replace(variant, lane=lane) for variant in variants)
        variants = tuple(
            msgspec.structs.replace(
                v, files={tower: name.replace("fp32", v.name) for tower, name in v.files.items()}
            )
            for v in variants
        )
        names = [name for name in bundle.manifest.files if name != "bom.cdx.json"]
        sources: dict[str, Path | bytes] = {name: bundle.file(name) for name in names}
        sources["target.toml"] = toml_from_resolved(resolved).encode()
        for tower in ("image", "text"):
            model = onnx.load_model_from_string(colour_tower(tower))
            model.doc_string = "FP16, as it were"
            sources[f"models/fp16/{tower}.onnx"] = model.SerializeToString()
            if tower in quantized:
                sources[f"models/int8/{tower}.onnx"] = with_qdq(colour_tower(tower))
        if fp32_nodes:
            lowered = LaneTower(
                source="models/fp32/text.onnx",
                opset=16,
                fp32_nodes=fp32_nodes,
                rewritten={},
                max_abs=0.0,
                min_cosine=1.0,
            )
            sources["models/fp16/lane.json"] = msgspec.json.encode(
                LaneRecord(of="fp16", towers={"text": lowered})
            )
        manifest = msgspec.structs.replace(bundle.manifest, variants=variants)
        write_bundle(tmp_path / "half", sources=sources, manifest=manifest)
    with open_bundle(tmp_path / "half") as bundle:
        return write_bundle(
            tmp_path / "demo", sources=write_with_shell(bundle, target_of(bundle)), manifest=bundle.manifest
        )


def run(
    bundle: Path, root: Path, *arguments: str, fails: str = "", wrong: str = "", shell: str = "sh"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shell, *(["sh"] if shell.endswith("busybox") else []), str(bundle / "finalize.sh"), *arguments],
        env={
            "PATH": os.environ["PATH"],
            "EDGEGLM_ROOT": str(root),
            "STUB_CALLS": str(root / "calls"),
            "STUB_BUNDLE": str(bundle),
            "STUB_FAILS": fails,
            "STUB_WRONG": wrong,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def receipt_of(bundle: Path) -> dict[str, Any]:
    found = json.loads((bundle.with_name("demo.finalized") / "receipt-trtexec.json").read_bytes())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_a_xavier_builds_lane_a_with_its_flags_and_keeps_the_faster(shell: str, tmp_path: Path):
    bundle, root = with_shell(tmp_path, lane="A"), board(tmp_path / "root", XAVIER)
    if (found := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed; install it to try its shell")
    done = run(bundle, root, shell=found)
    assert done.returncode == 0, done.stderr + done.stdout
    receipt = receipt_of(bundle)
    assert (receipt["chosen"], receipt["lane"], receipt["library_version"]) == ("int8", "A", "8.5.2")
    assert receipt["board"] == {"model": "A tegra194 board", "sm": "72", "l4t": "35.4.1", "power_mode": "0"}
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


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_neighbours_are_compared_as_at_home(shell: str, tmp_path: Path):
    if (found := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed; install it to try its shell")
    random = np.random.default_rng(3)
    gallery, kept = random.normal(size=(40, 16)), random.normal(size=(5, 16))
    made = kept + random.normal(size=kept.shape)
    (tmp_path / "gallery").mkdir()
    np.save(tmp_path / "gallery/rows.npy", gallery.astype(np.float32))
    offset = (tmp_path / "gallery/rows.npy").stat().st_size - gallery.size * 4
    near = np.argsort(-(kept @ gallery[:30].T), axis=1)[:, :10]
    here = np.argsort(-(made @ gallery[:30].T), axis=1)[:, :10]
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(near.tolist(), here.tolist(), strict=True)]
    lines = [f"{offset} 30 16 gallery/rows.npy", *(" ".join(map(str, row)) for row in near.tolist())]
    (tmp_path / "near").write_text("\n".join([*lines, ""]))
    (tmp_path / "actual").write_text("\n".join(f"{value:.8g}" for value in made.reshape(-1)) + "\n")
    script = importlib.resources.files("edgeglm.compile") / "finalize.sh"
    function = (
        "agreement() {" + script.read_text("utf-8").split("\nagreement() {")[1].split("\n}\n")[0] + "\n}\n"
    )
    command = [
        found,
        *(["sh"] if shell == "busybox" else []),
        "-euc",
        function + 'here=. agreement "$@"',
        "sh",
    ]
    done = subprocess.run(
        [*command, "actual", "near"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert 0.1 < float(done.stdout) < 0.95
    assert float(done.stdout) == pytest.approx(np.mean(shares), abs=1e-4)
    (tmp_path / "actual").write_text("1\n2\n")
    done = subprocess.run(
        [*command, "actual", "near"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "-1", "an output of another size agrees with nothing"


TEGRASTATS = """#!/bin/sh
while :; do
  echo "RAM 1/2MB VDD_GPU_SOC 1000mW/900mW VDD_IN 5000mW/4000mW NC 0mW/0mW"
  sleep 0.01
done
"""


@pytest.mark.parametrize("shell", ["dash", "busybox"])
def test_the_receipt_says_what_timing_took_where_the_board_tells(shell: str, tmp_path: Path):
    if (found := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed; install it to try its shell")
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    assert run(bundle, root, shell=found).returncode == 0
    assert receipt_of(bundle)["energy"] is None, "nothing measured is not nothing used"
    (root / "usr/bin").mkdir()
    (root / "usr/bin/tegrastats").write_text(TEGRASTATS)
    (root / "usr/bin/tegrastats").chmod(0o755)
    slow = TRTEXEC.replace('onnx="$(cat', 'sleep 0.1\nonnx="$(cat')
    (root / "usr/src/tensorrt/bin/trtexec").write_text(slow)
    assert run(bundle, root, shell=found).returncode == 0
    energy = msgspec.convert(receipt_of(bundle)["energy"], Energy)
    assert energy.source == "tegrastats"
    assert energy.samples >= 4
    assert energy.joules.keys() == {"VDD_GPU_SOC", "VDD_IN"}
    assert energy.joules["VDD_IN"] == pytest.approx(5.0 * energy.samples * 0.1)
    assert energy.joules["VDD_GPU_SOC"] == pytest.approx(energy.joules["VDD_IN"] / 5)


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


def test_an_altered_file_a_foreign_board_and_a_small_one_are_refused(tmp_path: Path):
    bundle = with_shell(tmp_path, target="jetson-agx-orin-64gb")
    root = board(tmp_path / "root", ORIN)
    foreign = run(bundle, board(tmp_path / "other", XAVIER))
    assert foreign.returncode == 2
    assert (
        "this is A tegra194 board (SM 72); the bundle is for jetson-agx-orin-64gb (SM 87)" in foreign.stderr
    )
    old = run(bundle, board(tmp_path / "other", XAVIER), "--any-board")
    assert "takes lane A, of which the bundle has nothing" in old.stderr
    small = run(bundle, board(tmp_path / "small", ORIN, free_kb=100_000))
    assert (small.returncode, "building needs 300 MB and 97 MB are free" in small.stderr) == (2, True)
    model = bundle / "models/int8/text.onnx"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes() + b"x")
    altered = run(bundle, root)
    assert (altered.returncode, "was altered or cut off" in altered.stderr) == (2, True)
    assert not (root / "calls").exists(), "nothing is built of what was altered"


def test_two_at_once_are_refused_and_a_killed_one_locks_nobody_out(tmp_path: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    lock = bundle.with_name("demo.finalized") / ".trtexec.lock"
    lock.mkdir(parents=True)
    (lock / "pid").write_text(f"{os.getpid()}\n")
    refused = run(bundle, root)
    assert (refused.returncode, f"at work (process {os.getpid()})" in refused.stderr) == (2, True)
    gone = subprocess.Popen(["true"])
    gone.wait()
    (lock / "pid").write_text(f"{gone.pid}\n")
    assert run(bundle, root).returncode == 0
    assert not lock.exists()


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
