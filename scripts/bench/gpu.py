#!/usr/bin/env python3
"""Short benches on the GPU at hand: the engine's own cost, ONNX Runtime on CUDA, TensorRT, the roofline.

    scripts/bench/gpu.py [JSON]

What is absent is a row that says so. Rounds are interleaved, medians are of 60 calls, numpy array in to
numpy array out. Needs onnx and numpy; onnxruntime-gpu, tensorrt or tensorrt_rtx as far as they are there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner_models import VOCABULARY, picture_model, text_model  # noqa: E402

from edgeglm.compile.builder import engine_from_onnx  # noqa: E402
from edgeglm.compile.contract import tower_profiles  # noqa: E402
from edgeglm.core.digest import sha256_bytes  # noqa: E402
from edgeglm.core.errors import EdgeglmError  # noqa: E402
from edgeglm.engines.cuda_devices import cuda_devices  # noqa: E402
from edgeglm.engines.cuda_driver import this_driver  # noqa: E402
from edgeglm.engines.libraries import imported_library  # noqa: E402
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine  # noqa: E402
from edgeglm.engines.plan import PlanMetadata, ShapeRange, TensorRecord  # noqa: E402
from edgeglm.engines.protocol import Engine, Feeds  # noqa: E402
from edgeglm.engines.tensorrt_engine import TensorRtEngine  # noqa: E402
from edgeglm.engines.timing import compare_latency  # noqa: E402
from edgeglm.export.costs import costs_from_onnx  # noqa: E402
from edgeglm.targets.roofline import floor_of, machine_of  # noqa: E402
from edgeglm.targets.schema import Peak, Target, known_targets, load_target  # noqa: E402

LENGTH, SIDE, BATCHES, ROUNDS = 16, 64, (1, 8, 32), 60
Row = dict[str, Any]


def feeds_of(tower: str, batch: int) -> Feeds:
    """Return input of ordinary size."""
    random = np.random.default_rng(0)
    if tower == "image":
        return {"pixels": random.random((batch, 3, SIDE, SIDE), dtype=np.float32)}
    ids = random.integers(0, VOCABULARY, (batch, LENGTH))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def here() -> Target:
    """Return the profile of GPU 0 by its name, else one of its compute capability without peaks."""
    device = cuda_devices()[0]
    words = device.name.lower().replace("-", " ").split()
    for name in known_targets():
        if name in words:
            return load_target(name)
    return msgspec.structs.replace(
        load_target("l4"), name="unknown", sm=device.sm, peak=Peak(), bandwidth_gb_s=None
    )


def doubling(folder: Path) -> Iterator[Row]:
    """Yield what a call of the engine costs when the kernel costs nothing, with graphs and without."""
    import pytest

    from tests.engines.stand_in_cuda import install
    from tests.engines.test_cuda_on_a_gpu import Twice

    for width in (2, 3 * SIDE * SIDE):

        def one(batch: int, width: int = width) -> dict[str, ShapeRange]:
            return {"pixels": ShapeRange(min=(batch, width), opt=(batch, width), max=(batch, width))}

        whole = {"pixels": ShapeRange(min=(1, width), opt=(8, width), max=(32, width))}
        record = PlanMetadata(
            library="tensorrt",
            library_version="10.3.0",
            sms=(87,),
            onnx_sha256="a" * 64,
            plan_sha256=sha256_bytes(b"plan"),
            size_bytes=4,
            profiles=(whole, *map(one, BATCHES)),
            precision="fp32",
            inputs=(TensorRecord(name="pixels", dtype="float32", shape=(-1, width)),),
            outputs=(TensorRecord(name="embedding", dtype="float32", shape=(-1, width)),),
        )
        plan = folder / "double.plan"
        plan.write_bytes(b"plan")
        with pytest.MonkeyPatch.context() as patch, ExitStack() as opened:
            engines: dict[str, Engine] = {}
            for name, graphs in (("graph", True), ("calls", False)):
                install(patch, Twice(), record)
                engines[name] = opened.enter_context(TensorRtEngine(plan, record, graphs=graphs))
            for batch in BATCHES:
                feeds = {"pixels": np.ones((batch, width), np.float32)}
                title = f"doubling kernel, {4 * width * batch:,} bytes in and out"
                yield from timed(title, batch, engines, feeds, {"embedding": feeds["pixels"] * 2})


def timed(title: str, batch: int, engines: dict[str, Engine], feeds: Feeds, expected: Any) -> Iterator[Row]:
    """Time engines interleaved; hold their last answers against ``{output: array}``."""
    if not engines:
        return
    calls = {name: (engine, feeds) for name, engine in engines.items()}
    for name, latency in compare_latency(calls, rounds=ROUNDS, warmup=12).items():
        engine = engines[name]
        answer = engine.infer(feeds)
        apart = max(float(np.abs(answer[key] - expected[key]).max()) for key in expected)
        yield {
            "what": title,
            "batch": batch,
            "by": name,
            "median_ms": round(latency.median_ms, 4),
            "p90_ms": round(latency.p90_ms, 4),
            "apart": apart,
            "profiles": getattr(engine, "in_use", None),
        }


def towers(folder: Path) -> Iterator[Row]:
    """Yield ONNX Runtime on CUDA, bound and not, and TensorRT, with graphs and without, beside the floor."""
    target = here()
    models = {"image": picture_model(folder / "image.onnx", SIDE, 64, 12)}
    models["text"] = text_model(folder / "text.onnx", 6)
    for tower, model in models.items():
        with ExitStack() as opened:
            plain, engines = opened.enter_context(OnnxRuntimeEngine(model)), dict[str, Engine]()
            for name, make in candidates(tower, model, folder, target).items():
                try:
                    engines[name] = opened.enter_context(make())
                except Exception as error:  # whatever a half-installed library does: the others go on
                    yield {"what": tower, "by": name, "absent": f"{type(error).__name__}: {error}"[:400]}
            costs = costs_from_onnx(model, length=LENGTH)
            for batch in BATCHES:
                feeds = feeds_of(tower, batch)
                floor = floor_of(costs, machine_of(target), batch)
                for row in timed(tower, batch, engines, feeds, plain.infer(feeds)):
                    if floor.floor_ms > 0:
                        row |= {"floor_ms": round(floor.floor_ms, 5), "binding": floor.binding}
                        row["holds"] = row["median_ms"] >= floor.floor_ms
                    yield row


def peaks(_: Path) -> Iterator[Row]:
    """Yield what torch reaches of the peaks that the roofline takes from this GPU's profile."""
    try:
        import torch
    except ImportError:
        yield {"what": "peaks", "absent": "torch is not installed"}
        return
    if not torch.cuda.is_available():
        yield {"what": "peaks", "absent": "this torch has no CUDA"}
        return
    known = machine_of(here())

    def best(call: Callable[[], object]) -> float:
        times = list[float]()
        event: Any = torch.cuda.Event  # torch's stubs leave it untyped
        for _ in range(12):
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return min(times)

    side = 8192
    one = torch.randn(side, side, device="cuda", dtype=torch.float16)
    rate = 2 * side**3 / best(lambda: one @ one)
    large = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    other = torch.empty_like(large)
    moved = 2 * large.numel() / best(lambda: other.copy_(large))
    for what, measured, peak in (
        ("fp16 operations a second", rate, known.rates.get("fp16")),
        ("bytes a second, read and written", moved, known.bandwidth),
    ):
        row: Row = {"what": what, "by": "torch", "measured": measured, "profile": peak}
        yield row | ({"holds": measured <= peak} if peak else {})


def candidates(tower: str, model: Path, folder: Path, target: Target) -> dict[str, Callable[[], Engine]]:
    """Return what may run a tower on the GPU, by name."""
    cuda = ("CUDAExecutionProvider",)
    made: dict[str, Callable[[], Engine]] = {
        "onnxruntime cuda, bound": lambda: OnnxRuntimeEngine(model, providers=cuda, io_binding=True),
        "onnxruntime cuda, plain": lambda: OnnxRuntimeEngine(model, providers=cuda),
    }
    for library in ("tensorrt", "tensorrt-rtx"):
        for graphs in (True, False):
            name = f"{library}, {'graph' if graphs else 'calls'}"

            def make(library: Any = library, graphs: bool = graphs) -> Engine:
                place = folder / f"{library}-{tower}.plan"
                if not place.is_file():
                    profiles = tower_profiles(tower, (1, 8, 32), (1, 8, LENGTH), BATCHES)
                    engine = engine_from_onnx(
                        model, targets=[target], library=library, precision="fp32", profiles=profiles
                    )
                    engine.write(folder, place.stem)
                record = msgspec.json.decode(place.with_suffix(".json").read_bytes(), type=PlanMetadata)
                return TensorRtEngine(place, record, graphs=graphs)

            made[name] = make
    return made


def tensorrt_rtx_here(folder: Path) -> Iterator[Row]:
    """Yield whether TensorRT-RTX builds for this GPU, or runs what was built for another, asked of it alone.

    The builder of edgeglm refuses GPUs that are not in the library's support matrix before it is asked.
    """
    try:
        rtx: Any = imported_library("tensorrt-rtx", absent="nothing is asked of it")
    except EdgeglmError as error:
        yield {"what": "tensorrt-rtx alone", "absent": str(error)[:400]}
        return
    model = text_model(folder / "rtx.onnx", 2)
    for name, capability in (
        ("this GPU", rtx.ComputeCapability.CURRENT),
        ("sm 80", rtx.ComputeCapability.SM80),
    ):
        said = list[str]()

        class Logger(rtx.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                rtx.ILogger.__init__(self)

            def log(self, severity: Any, message: str, said: list[str] = said) -> None:
                if severity in (rtx.ILogger.ERROR, rtx.ILogger.INTERNAL_ERROR):
                    said.append(message)

        logger = Logger()
        row: Row = {"what": "tensorrt-rtx alone", "by": f"built for {name}", "version": rtx.__version__}
        builder = rtx.Builder(logger)
        if builder is None or not bool(builder):
            yield row | {"built": False, "said": " / ".join(said)[:600]}
            continue
        network, config = builder.create_network(0), builder.create_builder_config()
        rtx.OnnxParser(network, logger).parse_from_file(str(model))
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
        profile = builder.create_optimization_profile()
        for place in range(network.num_inputs):
            profile.set_shape(network.get_input(place).name, (1, LENGTH), (8, LENGTH), (32, LENGTH))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        row["built"] = plan is not None
        if plan is not None:
            engine = rtx.Runtime(logger).deserialize_cuda_engine(plan)
            row["loaded"] = engine is not None
            row["context"] = engine is not None and engine.create_execution_context() is not None
        yield row | {"said": " / ".join(said)[:600]}


def machine() -> Row:
    """Describe the GPU and how it is reached."""
    device = cuda_devices()[0]
    with this_driver() as driver:
        found = {"way": driver.name, "zero_copy": driver.zero_copy}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "gpu": device.name,
        "sm": device.sm,
        "commit": commit.stdout.strip() or os.environ.get("EDGEGLM_COMMIT", "unknown"),
        **found,
    }


def main(arguments: list[str]) -> int:
    """Run every bench, print a line a row, write JSON; exit with 1 when one broke."""
    if not cuda_devices():
        sys.stdout.write("no GPU is here; nothing was measured\n")
        return 1
    result: Row = {"command": "scripts/bench/gpu.py", "machine": machine(), "rows": []}
    sys.stdout.write(json.dumps(result["machine"]) + "\n")
    broken = 0
    with tempfile.TemporaryDirectory() as scratch:
        for bench in (doubling, towers, tensorrt_rtx_here, peaks):
            try:
                for row in bench(Path(scratch)):
                    result["rows"].append(row)
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()
            except (EdgeglmError, ImportError, AssertionError):
                broken += 1
                sys.stdout.write(traceback.format_exc())
    if arguments:
        Path(arguments[0]).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return 1 if broken or any(row.get("holds") is False for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
