"""What the roofline's bench measures with: graphs of one plain character each, and this CPU's own peaks."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.targets.roofline import Machine


def model_of(
    path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[Any]
) -> Path:
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
