"""A board for the shell finalize: its files and its trtexec are stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.compile.contract import target_of
from edgeglm.compile.lane_record import LaneRecord, LaneTower
from edgeglm.compile.shell import write_with_shell
from edgeglm.core.recipe import EngineConfig
from edgeglm.targets.schema import load_target, resolve_target, toml_from_resolved
from scripts.fixtures.colours import colour_tower
from tests.compile.stand_ins import made
from tests.compile.test_triton import described

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
    --versionCompatible) holds_code=yes ;;
    --weightStreamingBudget=-1) streams=yes ;;
    --allowWeightStreaming) streams=yes ;;
  esac
done
if [ -n "$plan" ]; then
  case "$onnx" in *"$STUB_FAILS"*) [ -z "$STUB_FAILS" ] || { echo "Error: node odd"; exit 1; } ;; esac
  if grep -q foreign "$cache" 2>/dev/null; then echo "Error: timing cache"; exit 1; fi
  echo timed >>"$cache"
  echo "$onnx" >"$plan" || exit 1
  echo "$holds_code$streams" >>"$plan" || exit 1
  exit 0
fi
onnx="$(head -n 1 "$loaded")"
[ "$(tail -n 1 "$loaded")" = "$holds_code$streams" ] || { echo "Error: not loaded as it was built"; exit 1; }
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
    bundle: Path,
    root: Path,
    *arguments: str,
    fails: str = "",
    wrong: str = "",
    shell: str = "sh",
    path: str = os.environ["PATH"],
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shell, *(["sh"] if shell.endswith("busybox") else []), str(bundle / "finalize.sh"), *arguments],
        env={
            "PATH": path,
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
