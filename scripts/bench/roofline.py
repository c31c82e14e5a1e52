"""Hold the roofline's floor against measured latency on this CPU: no measurement may be below it.

    .venv/bin/python scripts/bench/roofline.py [BUNDLE ...]
    .venv/bin/python scripts/bench/roofline.py --finalized BUNDLE    # on a board, after finalize

Of each bundle the FP32 and INT8 towers are taken besides the drawn graphs. With --finalized nothing is
measured anew: what finalize timed on the board is held against the floor of the board's own profile, and
written to stdout.

The peaks are measured first, in the same library and on one thread: the best call of several small
products and a convolution, in FP32 and in INT8, and moving an array that no cache holds. Then each
graph is timed and compared with its floor. Writes docs/bench/roofline.json, .md and .svg.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort

from edgeglm.bundle.receipt import finalized_folder, read_receipt
from edgeglm.bundle.verify import open_bundle
from edgeglm.compile.contract import target_of
from edgeglm.compile.preflight import subjects_of
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.protocol import Feeds
from edgeglm.engines.timing import measure_latency
from edgeglm.export.costs import costs_from_onnx
from edgeglm.targets.costs import GraphCosts
from edgeglm.targets.roofline import Floor, Machine, floor_of, machine_of

sys.path.insert(0, str(Path(__file__).parent))
from roofline_models import drawn_models, measured_machine

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "bench"
BATCHES = (1, 8)
_INTEGER = {
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QAttention",
}  # fmt: skip
_FLOATING = {
    "Conv",
    "FusedConv",
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "FusedGemm",
    "Attention",
    "MultiHeadAttention",
}
LENGTH = 32


def feeds_for(costs: GraphCosts, batch: int) -> Feeds:
    """Return inputs of ones in the graph's shapes."""
    return {
        tensor.name: np.ones(
            [
                size if isinstance(size, int) else batch if axis == 0 else costs.length
                for axis, size in enumerate(tensor.shape)
            ],
            tensor.dtype,
        )
        for tensor in costs.inputs
    }


def integer_products(path: Path, folder: Path) -> tuple[int, int]:
    """Return how many products ONNX Runtime computes in integers once it has fused, and how many it has."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fused = onnx.load(folder / "optimized.onnx", load_external_data=False)
    kinds = [node.op_type for node in fused.graph.node]
    whole = sum(kind in _INTEGER for kind in kinds)
    return whole, whole + sum(kind in _FLOATING for kind in kinds)


def bundle_models(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the FP32 and INT8 towers of a bundle."""
    with open_bundle(path) as bundle:
        target = bundle.manifest.target.name
        for variant in bundle.manifest.variants:
            if variant.name in ("fp32", "int8"):
                for tower in sorted(variant.files):
                    yield f"{tower} tower, {variant.name} for {target}", bundle.model(variant.name, tower)


def finalized_rows(path: Path) -> Iterator[str]:
    """Yield one line a tower: what finalize timed on this board, against the floor of its profile."""
    with open_bundle(path) as bundle:
        receipt = read_receipt(finalized_folder(path))
        if receipt is None or receipt.member is None:
            raise SystemExit(
                "error: there is no receipt of a board of the target; run 'edgeglm finalize' there"
            )
        machine = machine_of({m.name: m for m in target_of(bundle).members}[receipt.member])
        if not machine.rates:
            raise SystemExit(f"error: the profile of {machine.name} has no peaks and so no floor")
        subjects = {subject.name: subject for subject in subjects_of(bundle)}
        yield f"{receipt.board.words}, {receipt.library} {receipt.library_version}, batch 1"
        for one in receipt.candidates:
            for tower in ("image", "text"):
                if (measured := one.latency_ms.get(f"{tower}_b1_ms")) is not None:
                    floor = floor_of(subjects[f"{one.variant} {tower}"].costs, machine, 1)
                    ratio = measured / floor.floor_ms
                    holds = "holds" if ratio >= 1 else "DOES NOT HOLD"
                    yield (
                        f"{one.variant} {tower}: floor {floor.floor_ms:.4f} ms by {floor.binding}, "
                        f"measured {measured:.4f} ms, {ratio:.1f} times; {holds}"
                    )


def measured_rows(name: str, path: Path, machine: Machine, folder: Path) -> Iterator[dict[str, object]]:
    """Yield one row a batch: the floor, the measured median, their ratio, and what ran in integers."""
    costs = costs_from_onnx(path, length=LENGTH)
    integers, products = integer_products(path, folder)
    with OnnxRuntimeEngine(path, threads=1) as engine:
        for batch in BATCHES:
            floor: Floor = floor_of(costs, machine, batch)
            latency = measure_latency(engine, feeds_for(costs, batch), rounds=15)
            yield {
                "graph": name,
                "batch": batch,
                "mflop": round(floor.flops / 1e6, 1),
                "megabytes": round(floor.bytes / 1e6, 2),
                "floor_ms": round(floor.floor_ms, 4),
                "binding": floor.binding,
                "integer_products": integers,
                "products": products,
                "measured_ms": round(latency.median_ms, 4),
                "ratio": round(latency.median_ms / floor.floor_ms, 2) if floor.floor_ms else None,
                "holds": latency.median_ms >= floor.floor_ms,
            }


def page(result: dict[str, object], rows: list[dict[str, object]]) -> str:
    """Return the readable table."""
    machine = result["machine"]
    assert isinstance(machine, dict)
    lines = [
        "# The roofline's floor against this CPU",
        "",
        f"`{result['command']}` at commit {result['commit']}, {machine['name']}, one thread, "
        f"load {result['load']}.",
        "",
        f"Measured peaks: {machine['fp32_gflops']:.0f} GFLOP/s in FP32 and {machine['int8_gops']:.0f} GOP/s "
        f"in INT8 through ONNX Runtime, {machine['bandwidth_gb_s']:.1f} GB/s from memory, "
        f"{machine['cache_mb']:.1f} MB of caches that may keep weights from call to call.",
        "",
        "The floor is a bound and no promise: every fusion is taken as done, every weight is read once. "
        "A ratio of 1.0 would be perfect; a row that does not hold would be an error of the model.",
        "",
        "The column of products says how many ONNX Runtime computes in integers, by the graph that its "
        "fusions leave. The floor of a Q/DQ graph is that of integer products. Where a graph is Q/DQ over "
        "FP16, as TensorRT takes it, ONNX Runtime finds none of its integer kernels: it dequantizes every "
        "operand and multiplies in floating point, so such a row is many times its floor. That says nothing "
        "of the floor, and is why a CPU's bundle has another INT8 ([quantization.md](quantization.md)).",
        "",
        "| graph | batch | MFLOP | MB | products in INT8 | floor ms | bound by | measured ms "
        "| measured / floor | holds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    lines += [
        f"| {row['graph']} | {row['batch']} | {row['mflop']:,} | {row['megabytes']:,} "
        f"| {row['integer_products']} of {row['products']} | {row['floor_ms']} "
        f"| {row['binding']} | {row['measured_ms']} | {row['ratio'] or '-'} "
        f"| {'yes' if row['holds'] else 'NO'} |"
        for row in rows
    ]
    lines += ["", "![Measured points under this CPU's roofline](roofline.svg)", "", *gpu_lines()]
    lines += [
        "On a board or GPU, `scripts/bench/roofline.py --finalized BUNDLE` holds what `edgeglm finalize` "
        "timed there against the floor of its profile. No board was at hand.",
    ]
    return "\n".join([*lines, ""])


def gpu_lines() -> list[str]:
    """Return what scripts/bench/gpu.py last measured on a GPU against the floor of its profile, if it did."""
    found = OUT / "gpu.json"
    if not found.is_file():
        return []
    result = json.loads(found.read_text())
    machine = result["machine"]
    rows = [row for row in result["rows"] if "floor_ms" in row]
    lines = [
        f"## On a GPU: {machine['gpu']}",
        "",
        f"`{result['command']}` at commit {machine['commit']}: two drawn towers on ONNX Runtime's CUDA "
        "provider, FP32, numpy array in to numpy array out. At this size the launches of kernels bind, of "
        "which the floor knows nothing; what it says here is that no measurement fell below it.",
        "",
        "| graph | by | batch | floor ms | bound by | measured ms | measured / floor | holds |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    lines += [
        f"| {row['what']} | {row['by']} | {row['batch']} | {row['floor_ms']} | {row['binding']} "
        f"| {row['median_ms']} | {row['median_ms'] / row['floor_ms']:.0f} "
        f"| {'yes' if row['holds'] else 'NO'} |"
        for row in rows
    ]
    lines += [
        f"| {row['what']}: {row['measured']:.3g}, profile {row['profile']:.3g} | {row['by']} | - | - | - | - "
        f"| {row['profile'] / row['measured']:.2f} | {'yes' if row['holds'] else 'NO'} |"
        for row in result["rows"]
        if row.get("profile")
    ]
    return [*lines, ""]


def plot(machine: Machine, rows: list[dict[str, object]], path: Path) -> None:
    """Draw the roof and every measured point below it."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "edgeglm"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    assert machine.bandwidth is not None
    intensity = np.geomspace(0.2, 2000, 200)
    axes.plot(
        intensity, np.minimum(machine.rates["fp32"], intensity * machine.bandwidth) / 1e9, color="black"
    )
    for row in rows:
        mflop, megabytes, milliseconds = (float(str(row[k])) for k in ("mflop", "megabytes", "measured_ms"))
        mark = "o" if row["batch"] == 1 else "s"
        axes.plot(
            mflop / megabytes, mflop / milliseconds, mark, label=f"{row['graph']}, batch {row['batch']}"
        )
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte (weights, inputs, outputs)", ylabel="GFLOP/s"
    )
    axes.legend(fontsize=6, loc="lower right")
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str]) -> int:
    """Measure and write; exit with 1 when a floor does not hold."""
    if arguments[:1] == ["--finalized"]:
        sys.stdout.writelines(f"{line}\n" for line in finalized_rows(Path(arguments[1])))
        return 0
    load = round(os.getloadavg()[0], 1)
    given = [model for path in arguments for model in bundle_models(Path(path))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        machine = measured_machine(folder)
        rows = [
            row
            for name, path in (*drawn_models(folder), *given)
            for row in measured_rows(name, path, machine, folder)
        ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    result = {
        "command": " ".join(["scripts/bench/roofline.py", *(Path(path).name for path in arguments)]),
        "commit": commit,
        "load": load,
        "machine": {
            "name": machine.name,
            "threads": 1,
            "fp32_gflops": round(machine.rates["fp32"] / 1e9, 1),
            "int8_gops": round(machine.rates["int8"] / 1e9, 1),
            "bandwidth_gb_s": round((machine.bandwidth or 0) / 1e9, 2),
            "cache_mb": round(machine.resident_bytes / 1e6, 1),
        },
        "rows": rows,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "roofline.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    (OUT / "roofline.md").write_text(page(result, rows))
    plot(machine, rows, OUT / "roofline.svg")
    sys.stdout.write(json.dumps(result["machine"]) + "\n")
    for row in rows:
        sys.stdout.write(
            f"{row['graph']:50} b{row['batch']} {row['floor_ms']} {row['measured_ms']} {row['ratio']}\n"
        )
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
