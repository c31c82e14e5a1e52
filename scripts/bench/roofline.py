"""Hold the roofline's floor against measured latency on this CPU: no measurement may be below it.

    .venv/bin/python scripts/bench/roofline.py [NAME=model.onnx ...]

The peaks are measured first, in the same library and on one thread: the best call of several small
products and a convolution, in FP32 and in INT8, and moving an array that no cache holds. Then each
graph is timed and compared with its floor. Writes docs/bench/roofline.json, .md and .svg.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.protocol import Feeds
from edgeglm.engines.timing import measure_latency
from edgeglm.export.costs import costs_from_onnx
from edgeglm.targets.costs import GraphCosts
from edgeglm.targets.roofline import Floor, Machine, floor_of

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "bench"
BATCHES = (1, 8)
LENGTH = 32


def model_of(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list) -> Path:
    """Write a graph from ``x`` float32 to ``y``."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", *[None] * (len(shape) - 1)])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def drawn_models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield graphs with one plain character each."""
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32) * 0.02

    node = helper.make_node
    yield (
        "one product, 512 rows of 1024 x 1024",
        model_of(
            folder / "matmul.onnx",
            [node("MatMul", ["x", "w"], ["y"])],
            {"w": weights(1024, 1024)},
            ["B", 512, 1024],
        ),
    )
    yield (
        "matrix-vector, 64 MB of weights",
        model_of(
            folder / "gemv.onnx", [node("MatMul", ["x", "w"], ["y"])], {"w": weights(4096, 4096)}, ["B", 4096]
        ),
    )
    convolutions, filters, name = [], {}, "x"
    for layer in range(6):
        filters[f"w{layer}"] = weights(64, 64, 3, 3)
        output = "y" if layer == 5 else f"a{layer}"
        convolutions.append(node("Conv", [name, f"w{layer}"], [f"c{layer}"], pads=[1] * 4))
        convolutions.append(node("Relu", [f"c{layer}"], [output]))
        name = output
    yield (
        "six 3 x 3 convolutions, 64 channels, 40 x 40",
        model_of(folder / "conv.onnx", convolutions, filters, ["B", 64, 40, 40]),
    )
    layers, table, name = [], {}, "x"
    for layer in range(12):
        table[f"u{layer}"], table[f"d{layer}"] = weights(384, 1536), weights(1536, 384)
        output = "y" if layer == 11 else f"o{layer}"
        layers += [
            node("MatMul", [name, f"u{layer}"], [f"h{layer}"]),
            node("Relu", [f"h{layer}"], [f"r{layer}"]),
            node("MatMul", [f"r{layer}", f"d{layer}"], [output]),
        ]
        name = output
    yield (
        "twelve feed-forward blocks, 32 tokens of 384",
        model_of(folder / "ffn.onnx", layers, table, ["B", 32, 384]),
    )


def best_seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the shortest of several calls."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def measured_machine(folder: Path) -> Machine:
    """Measure this CPU's rates on one thread.

    A peak is what the machine can do at its best, so it is the best call of the best of several
    kernels, short enough that some calls are not interrupted by other work.
    """
    random = np.random.default_rng(0)
    rates = {"fp32": 0.0, "int8": 0.0}
    for rows, inner, columns in ((256, 256, 256), (512, 512, 512), (64, 384, 1536), (128, 1024, 256)):
        operations = 2 * rows * inner * columns
        left = random.normal(size=(rows, inner)).astype(np.float32)
        right = random.normal(size=(inner, columns)).astype(np.float32)
        product = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        integers = [
            helper.make_node("Cast", ["x"], ["u"], to=TensorProto.UINT8),
            helper.make_node("MatMulInteger", ["u", "w"], ["p"]),
            helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
        ]
        for name, nodes, weight in (("fp32", product, right), ("int8", integers, right.astype(np.int8))):
            path = model_of(folder / "peak.onnx", nodes, {"w": weight}, ["B", inner])
            with OnnxRuntimeEngine(path, threads=1) as engine:
                seconds = best_seconds(partial(engine.infer, {"x": np.abs(left)}), 200)
            rates[name] = max(rates[name], operations / seconds)
    filters = random.normal(size=(64, 64, 3, 3)).astype(np.float32)
    convolution = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)]
    path = model_of(folder / "peak.onnx", convolution, {"w": filters}, ["B", 64, 20, 20])
    with OnnxRuntimeEngine(path, threads=1) as engine:
        seconds = best_seconds(partial(engine.infer, {"x": np.ones((1, 64, 20, 20), np.float32)}), 200)
    rates["fp32"] = max(rates["fp32"], 2 * 64 * 400 * 64 * 9 / seconds)
    large = np.ones(64 << 20, np.float32)
    target = np.empty_like(large)
    reading = large.nbytes / best_seconds(large.max, 8)
    copying = 2 * large.nbytes / best_seconds(partial(np.copyto, target, large), 8)
    return Machine(
        name=cpu_name(),
        rates={"fp32": rates["fp32"], "int8": rates["int8"]},
        bandwidth=max(reading, copying),
        resident_bytes=cache_bytes(),
    )


def cache_bytes() -> int:
    """Return all caches that one core may use, from the kernel's own table."""
    total = 0
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        found = re.fullmatch(r"(\d+)([KM])", (cache / "size").read_text().strip())
        if found and (cache / "type").read_text().strip() != "Instruction":
            total += int(found[1]) << (10 if found[2] == "K" else 20)
    return total


def cpu_name() -> str:
    """Return the CPU's own name."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


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


def measured_rows(name: str, path: Path, machine: Machine) -> Iterator[dict[str, object]]:
    """Yield one row a batch: the floor, the measured median, their ratio."""
    costs = costs_from_onnx(path, length=LENGTH)
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
        "with other work on the machine.",
        "",
        f"Measured peaks: {machine['fp32_gflops']:.0f} GFLOP/s in FP32 and {machine['int8_gops']:.0f} GOP/s "
        f"in INT8 through ONNX Runtime, {machine['bandwidth_gb_s']:.1f} GB/s from memory, "
        f"{machine['cache_mb']:.1f} MB of caches that may keep weights from call to call.",
        "",
        "The floor is a bound and no promise: every fusion is taken as done, every weight is read once. "
        "A ratio of 1.0 would be perfect; a row that does not hold would be an error of the model.",
        "",
        "| graph | batch | MFLOP | MB | floor ms | bound by | measured ms | measured / floor | holds |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    lines += [
        f"| {row['graph']} | {row['batch']} | {row['mflop']:,} | {row['megabytes']:,} | {row['floor_ms']} "
        f"| {row['binding']} | {row['measured_ms']} | {row['ratio'] or '-'} "
        f"| {'yes' if row['holds'] else 'NO'} |"
        for row in rows
    ]
    return "\n".join([*lines, "", "![Measured points under this CPU's roofline](roofline.svg)", ""])


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
    """Measure, compare, write; exit with 1 when a floor is above what was measured."""
    given = [(name, Path(path)) for name, _, path in (argument.partition("=") for argument in arguments)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        machine = measured_machine(folder)
        rows = [
            row
            for name, path in (*drawn_models(folder), *given)
            for row in measured_rows(name, path, machine)
        ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    result = {
        "command": " ".join(["scripts/bench/roofline.py", *(f"'{name}'=MODEL" for name, _ in given)]),
        "commit": commit,
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
