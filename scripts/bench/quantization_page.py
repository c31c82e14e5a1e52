"""The readable tables of docs/bench/quantization.json, and the stamp of every row."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE

ROOT = Path(__file__).resolve().parents[2]
HIDING = "scripts/bench/without_avx512.py"  # which runs a bench as on AVX2, and says so in the environment
HIDDEN = "WITHOUT_AVX512" in os.environ


def stamped(row: Mapping[str, Any]) -> dict[str, Any]:
    """Add the commit and the machine to a row."""
    return {**row, "commit": _commit(), "machine": _machine()}


def written(path: Path, result: dict[str, Any]) -> None:
    """Write both files."""
    result["command"] = " ".join([*([HIDING] if HIDDEN else []), "scripts/bench/quantization.py"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(page(result)) + "\n")


def page(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield from (
        "# Quantization beside its peers",
        "",
        f"`{result['command']}`, one thread. Every file of a table is made from the same samples; "
        "cosines are on samples that none of them saw; speeds are medians of interleaved calls beside "
        "FP32. What is kept comes with its 95 % bootstrap interval, over queries paired with FP32's, or over "
        "samples where the score is a cosine. Seconds are of making the file, for edgeglm the whole search. "
        "Each row names its commit; speeds are of the processor that is named. "
        f"{ONE_RELEVANT_NOTE}",
        "",
        "The kernels are those of AVX2, the processor is not: see the head of that script."
        if HIDING in result["command"]
        else "The same on AVX2: [quantization_avx2.md](quantization_avx2.md).",
    )
    for name, model in result.get("models", {}).items():
        yield from _model(name, model)
    yield from _search(result.get("models", {}))
    yield from _both(result.get("both", []))
    yield from _methods(result.get("models", {}))
    yield from _curves(result.get("models", {}))
    yield from _memory(result.get("memory", []))
    said = (*TRIED, *result.get("notes", ()))
    yield from ("", "## What falls short, and what was tried", "", *(f"- {text}" for text in said))


def _model(name: str, model: Mapping[str, Any]) -> Iterator[str]:
    ops = model["op_types"]
    only = "" if len(ops) == 3 else f" Only {' and '.join(ops)} are quantized, by all."
    speed = model.get("speed", {})
    yield from (
        "",
        f"## {name}",
        "",
        f"Score: {model['score']}, to reach {model['reach']:g}, beyond {model['beyond']:g}; speed to reach "
        f"{model['speed_reach']:g} x FP32. {model['samples']} calibration samples.{only}",
        "",
        f"| what | kept | mean cosine | worst cosine | x FP32, batch 1 | batch {speed.get('batch', '-')} "
        "| MB | wall s | CPU s | result | commit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    )
    rows = model.get("rows", [])
    yield from (_row(row, model) for row in rows)
    machines = dict.fromkeys(row["machine"] for row in (*rows, *([speed] if speed else [])))
    yield from ("", f"Computed on {'; '.join(machines) or 'no machine yet'}.")
    for ours in (row for row in rows if "scheme" in row):
        yield from (
            "",
            f"Chosen: {ours['scheme']} with {', '.join(ours['methods'])} ranges, {ours['int8_nodes']} nodes "
            f"in INT8 and {ours['high_nodes']} in FP32, after {ours['evaluations']} evaluations. "
            f"{ours['machine']}; speeds at {speed.get('commit', 'no commit yet')}.",
        )


def _row(row: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    if "kept" not in row:
        return f"| {row['what']} | - | - | - | - | - | - | - | - | {row['failed']} | {row['commit']} |"
    faster = model.get("speed", {}).get("faster", {}).get(row["what"])
    result = "not timed"
    if faster:
        result = "falls short"
        if row["kept"] >= model["reach"] and min(faster.values()) >= model["speed_reach"]:
            result = "beyond" if row["kept"] >= model["beyond"] else "reached"
    bounds = row.get("interval")
    spread = f" ({bounds[0]:.4f} to {bounds[1]:.4f})" if bounds else ""
    speeds = f"{faster['1']:.2f} | {faster['whole']:.2f}" if faster else "- | -"
    cells = (
        row["what"],
        f"{row['kept']:.4f}{spread}",
        f"{row['mean_cosine']:.5f}",
        f"{row['min_cosine']:.5f}",
        speeds,
        row["megabytes"],
        row.get("wall_seconds", "-"),
        row.get("cpu_seconds", "-"),
        result,
        row["commit"],
    )
    return f"| {' | '.join(map(str, cells))} |"


def _search(models: Mapping[str, Any]) -> Iterator[str]:
    rows = {name: model["search"] for name, model in models.items() if "search" in model}
    if not rows:
        return
    yield from (
        "",
        "## Wall time of the search, default student",
        "",
        "Alone on the machine; conversions, scoring and timing included. The peer is one quantize_static and "
        "one scoring, times as many evaluations as the search made. To reach: 180 s for both towers, "
        "beyond: 60 s.",
        "",
        "| what | evaluations | wall s | CPU s | peer, each | peer x evaluations | schemes timed (x FP32) "
        "| commit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    )
    for name, row in rows.items():
        timed = ", ".join(f"{scheme} {gain:.2f}" for scheme, gain in row["timed"].items())
        yield (
            f"| {name} | {row['evaluations']} | {row['wall_seconds']} | {row['cpu_seconds']} "
            f"| {row['peer_wall_seconds_each']} | {row['peer_wall_seconds']} | {timed} | {row['commit']} |"
        )
    sums = {
        key: round(sum(row[key] for row in rows.values()), 1)
        for key in ("evaluations", "wall_seconds", "cpu_seconds", "peer_wall_seconds")
    }
    yield (
        f"| both | {sums['evaluations']:g} | {sums['wall_seconds']} | {sums['cpu_seconds']} | - "
        f"| {sums['peer_wall_seconds']} | - | - |"
    )


def _both(rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield from (
        "",
        "## Both towers together, as a build makes them",
        "",
        "Kept: of mAP@10, in the worst pool of queries; the gate is 0.99. What passes first travels.",
        "",
        "| target | variant | towers | kept | result | made by | commit |",
        "| --- | --- | --- | ---: | --- | --- | --- |",
    )
    for row in rows:
        if "precisions" not in row:
            continue
        towers = " + ".join(f"{tower} {kind}" for tower, kind in sorted(row["precisions"].items()))
        made = ", ".join(f"{tower}: {how}" for tower, how in sorted(row["made_by"].items()))
        said = "travels" if row["travels"] else "passed" if row["passed"] else row["reason"]
        yield (
            f"| {row['target']} | {row['variant']} | {towers} | {row['kept']:.4f} | {said} | {made or '-'} "
            f"| {row['commit']} |"
        )


def _methods(models: Mapping[str, Any]) -> Iterator[str]:
    rows = [(name, row) for name, model in models.items() for row in model.get("methods", [])]
    if not rows:
        return
    yield from (
        "",
        "## Methods",
        "",
        "The whole model by one method at a time, everything else alike. What is kept is the task's metric "
        "for the student, the cosine for MiniLM.",
        "",
        "| model | method | scheme | kept | mean cosine | MB | engines by TensorRT-RTX | commit |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | --- |",
    )
    for name, row in rows:
        engines = ", ".join(f"{target}: {size}" for target, size in row.get("engines", {}).items()) or "-"
        found = (
            f"{row['kept']:.4f} | {row['mean_cosine']:.5f} | {row['megabytes']}"
            if "kept" in row
            else f"{row['failed']} | - | -"
        )
        yield f"| {name} | {row['what']} | {row['scheme']} | {found} | {engines} | {row['commit']} |"


def _curves(models: Mapping[str, Any]) -> Iterator[str]:
    curves = [(name, curve) for name, model in models.items() for curve in model.get("curve", [])]
    if not curves:
        return
    sizes = [point["samples"] for point in curves[0][1]["points"]]
    yield from (
        "",
        "## Accuracy against the size of the calibration set",
        "",
        "`edgeglm calibrate --curve`, static INT8, the whole model; kept of mAP@10 where there is a task "
        "(else of the cosine), and how far the ranges moved since the size before.",
        "",
        f"| model | ranges | {' | '.join(map(str, sizes))} | commit |",
        f"| --- | --- | {' | '.join('---:' for _ in sizes)} | --- |",
    )
    for name, curve in curves:
        cells = []
        for point in curve["points"]:
            kept = point["kept"] if point["kept"] is not None else point["mean_cosine"]
            cells.append(f"{kept:.4f} ({point['moved']:.1%})")
        yield f"| {name} | {curve['ranges']} | {' | '.join(cells)} | {curve['commit']} |"


def _memory(rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield from (
        "",
        "## Memory of calibration",
        "",
        "Peak of a process that works on the student's image tower, data on disk; to reach: constant within "
        "10 %.",
        "",
        "| what | samples | peak MB | grows by | result | commit |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    )
    for row in rows:
        result = "constant" if row["growth"] <= 1.1 else "grows"
        yield (
            f"| {row['what']} | {row['samples'][0]} -> {row['samples'][1]} "
            f"| {row['peak_mb'][0]} -> {row['peak_mb'][1]} | {row['growth'] - 1:+.1%} | {result} "
            f"| {row['commit']} |"
        )


@cache
def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@cache
def _machine() -> str:
    words = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*:\s*(.+)$", words, re.MULTILINE)
    kinds = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "avx2": "AVX2, no VNNI"}
    vector = next((kind for flag, kind in kinds.items() if flag in words), "no AVX2")
    hidden = " (AVX-512 hidden from ONNX Runtime)" if HIDDEN else ""
    return f"{found[1].strip() if found else platform.machine()}, {os.cpu_count()} cores, {vector}{hidden}"


TRIED = (
    "ModelOpt, defaults: its FP16 Q/DQ are read by ONNX Runtime on a CPU, which truncates where the "
    "specification rounds, so that its row says as much of that reader as of ModelOpt; with FP32 besides, "
    "8-bit weights saturate in that reader's kernels on a CPU without VNNI. The last row computes the same "
    "file as it is written: that is what ModelOpt keeps on a GPU, where no kernel here computes it in INT8.",
    "ModelOpt's mse calibrator (0.47) passes the bits as a bias and destroys a model. Least-squares ranges "
    "are found on ONNX Runtime's histogram instead.",
    "AdaRound: neither ModelOpt nor onnxruntime.quantization has it for ONNX files, and none was written by "
    "hand.",
    "Speed on TensorRT targets is not measured here: no GPU was at hand; the device times the file.",
)
