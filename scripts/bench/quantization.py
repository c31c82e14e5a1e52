"""INT8 beside its peers: accuracy, speed on this CPU, time of the search, memory, and what methods give.

    .venv/bin/python scripts/bench/quantization.py [--store FOLDER] [PART ...] [--only NAME ...]
    .venv/bin/python scripts/bench/without_avx512.py scripts/bench/quantization.py files search speed \
        --output docs/bench/quantization_avx2.json

Parts, all by default: `files` makes every file and scores it; `search` times the search of the student's
towers beside its peers; `speed` times all files interleaved; `both` quantizes both towers together;
`methods` compares methods; `curve` draws accuracy against set size; `memory` finds peaks.
`files` leaves its files in --work, where `speed` finds them.

Needs a finished `edgeglm build` in the store, for the student and the data; other models are pinned assets.
Every file of a model is made from the same calibration samples and measured on the same held-out ones. Writes
docs/bench/quantization.json and .md, or --output; every row carries the commit and machine that made it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from quantization_memory import memory_rows
from quantization_methods import both_rows, curve_rows, method_rows
from quantization_models import Subject, as_written, peer_files, subjects
from quantization_page import stamped, written

from edgeglm.calibration.any_model import quantize_onnx
from edgeglm.calibration.outcome import Outcome, Settings
from edgeglm.calibration.precision import embeddings_of, fidelity
from edgeglm.core.store import Store, default_store_root
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.timing import compare_latency
from edgeglm.evaluate.parity import cosine_rows
from edgeglm.evaluate.retrieval import UnusableEmbeddingsError, ratio_of_means
from edgeglm.targets.schema import load_target

OUT = Path(__file__).resolve().parents[2] / "docs" / "bench" / "quantization.json"
PARTS = ("files", "search", "speed", "both", "methods", "curve", "memory")
ROUNDS = 15
OURS = "edgeglm quantize"


def main(arguments: list[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), metavar="PART")  # [] is none: all
    parser.add_argument("--store", type=Path, default=default_store_root())
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgeglm-quantization")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--output", type=Path, default=OUT)
    asked = parser.parse_args(arguments)
    parts = asked.parts or list(PARTS)
    result = json.loads(asked.output.read_text()) if asked.output.is_file() else {}
    if isinstance(result.get("models"), list):  # of an earlier form, whose rows name no commit
        result = {}
    store = Store(asked.store)
    asked.work.mkdir(parents=True, exist_ok=True)
    for subject in subjects(store, asked.work, set(asked.only)):
        model = result.setdefault("models", {}).setdefault(subject.name, {})
        folder = asked.work / subject.name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        if "files" in parts:
            model.clear()
            model["rows"] = made_rows(subject, folder, asked.evaluations)
        model.update(described(subject))
        if "search" in parts and subject.score:
            model["search"] = stamped(searched(subject, folder, asked.evaluations))
        if "speed" in parts:
            model["speed"] = stamped(speeds(subject, folder))
        if "methods" in parts:
            model["methods"] = [stamped(row) for row in method_rows(subject, folder)]
        if "curve" in parts:
            model["curve"] = [stamped(row) for row in curve_rows(subject)]
        written(asked.output, result)
    if "both" in parts:
        result["both"] = [stamped(row) for row in both_rows(store, asked.work)]
        written(asked.output, result)
    if "memory" in parts:
        result["memory"] = [stamped(row) for row in memory_rows(store, asked.work)]
        written(asked.output, result)
    return 0


def described(subject: Subject) -> dict[str, Any]:
    """Return what a model's table says above its rows."""
    return {
        "score": "mAP@10 / FP32" if subject.score else "cosine to FP32",
        "reach": subject.reach,
        "beyond": subject.beyond,
        "speed_reach": subject.speed_reach,
        "samples": subject.calibration.samples,
        "op_types": list(subject.op_types),
    }


def made_rows(subject: Subject, folder: Path, evaluations: int) -> list[dict[str, Any]]:
    """Make every file of a model and score it."""
    baseline = subject.score(subject.path) if subject.score else 1.0
    rows = []
    ours, seconds = quantized(subject, folder, evaluations, (subject.beyond, subject.reach))
    if ours.passed:
        row = {"what": OURS, "file": "ours/model.onnx", **seconds, **chosen(ours)}
        rows.append({**row, **accuracy(subject, folder / row["file"], baseline)})
    else:
        rows.append({"what": OURS, "failed": ours.search.reason})
    for name, make in peer_files(subject, folder):
        clock = Clock()
        made: Path | None = None
        try:
            made = make()
            row = {"what": name, "file": made.name, **clock.seconds}
            rows.append({**row, **accuracy(subject, made, baseline)})
        except Exception as error:  # a peer that cannot, or whose file cannot be computed, is a row too
            words = " ".join(str(error).split()).replace("|", "/")
            rows.append({"what": name, "failed": f"{type(error).__name__}: {words[:160]}"})
            if made is not None:
                made.unlink()
    if (folder / "modelopt-fp32.onnx").is_file():
        with as_written(subject):
            found = accuracy(subject, folder / "modelopt-fp32.onnx", baseline)
        rows.append({"what": "ModelOpt, FP32 besides, as a GPU would add up", **found})
    return [stamped(row) for row in rows]


def quantized(
    subject: Subject, folder: Path, evaluations: int, gates: Sequence[float]
) -> tuple[Outcome, dict[str, float]]:
    """Search above the first gate that can be passed."""
    clock = Clock()
    for gate in gates:
        ours = quantize_onnx(
            subject.path,
            subject.calibration,
            folder / "ours",
            target=load_target("cpu"),
            settings=Settings(gate=gate, evaluations=evaluations, op_types=subject.op_types),
            metric=subject.score,
            metric_name="mAP@10" if subject.score else "cosine",
        )
        if ours.passed:
            break
    return ours, clock.seconds


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> dict[str, float]:
        """Both, to a tenth."""
        return {
            "wall_seconds": round(time.perf_counter() - self._wall, 1),
            "cpu_seconds": round(time.process_time() - self._cpu, 1),
        }


def searched(subject: Subject, folder: Path, evaluations: int) -> dict[str, Any]:
    """Time the search above the goal to reach; and quantize_static scored once, times its evaluations."""
    assert subject.score is not None
    subject.forget()
    ours, seconds = quantized(subject, folder / "search", evaluations, (subject.reach,))
    subject.forget()
    subject.score(subject.path)  # FP32's own embeddings are known to both
    name, make = next(iter(peer_files(subject, folder)))
    clock = Clock()
    subject.score(make())
    count = len(ours.search.evaluations)
    return {
        **seconds,
        "evaluations": count,
        "timed": {timing.scheme: timing.speedup for timing in ours.search.timings},
        "peer": name,
        "peer_wall_seconds_each": clock.seconds["wall_seconds"],
        "peer_wall_seconds": round(clock.seconds["wall_seconds"] * count, 1),
    }


def chosen(ours: Outcome) -> dict[str, Any]:
    """Return what the search decided."""
    plan = ours.search.chosen
    assert plan is not None
    high = [node for group in plan.group if group.precision == "high" for node in group.nodes]
    return {
        "scheme": plan.scheme,
        "methods": sorted({group.method for group in plan.group if group.precision == "int8"}),
        "int8_nodes": len(plan.int8_nodes),
        "high_nodes": len(high),
        "evaluations": len(ours.search.evaluations),
    }


def accuracy(subject: Subject, path: Path, baseline: float) -> dict[str, Any]:
    """Score one file, and take its cosine to FP32 on the held-out samples."""
    try:
        found = fidelity(path, subject.path, subject.held_out)
        kept = subject.score(path) / baseline if subject.score else found.mean_cosine
        low, high = interval(subject, path)
    except UnusableEmbeddingsError:
        return {"failed": "its embeddings are not finite"}
    return {
        "kept": round(kept, 4),
        "interval": [round(low, 4), round(high, 4)],
        "mean_cosine": round(found.mean_cosine, 5),
        "min_cosine": round(found.min_cosine, 5),
        "megabytes": round(path.stat().st_size / 1e6, 1),
    }


def interval(subject: Subject, path: Path) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of what is kept: over queries, paired with FP32, or over samples."""
    if subject.precisions is not None:
        mine, theirs = subject.precisions(path), subject.precisions(subject.path)
    else:
        rows = [embeddings_of(one, subject.held_out) for one in (path, subject.path)]
        mine = cosine_rows(*rows)
        theirs = np.ones_like(mine)
    found = ratio_of_means(mine, theirs)
    return found.low, found.high


def speeds(subject: Subject, folder: Path) -> dict[str, Any]:
    """Time all files beside FP32 in one interleaved run: times faster, at batch 1 and a whole batch."""
    files: dict[str, Path] = {OURS: folder / "ours" / "model.onnx"}
    files |= {name: folder / file for name, file in PEER_FILES.items()}
    files = {name: path for name, path in files.items() if path.is_file()}
    engines = {
        name: OnnxRuntimeEngine(path, threads=1, spinning=False)
        for name, path in {"FP32": subject.path, **files}.items()
    }
    found: dict[str, dict[str, float]] = {name: {} for name in files}
    whole = subject.held_out[0]
    for engine in engines.values():
        engine.load()
    for label, feeds in (("1", {n: a[:1] for n, a in whole.items()}), ("whole", whole)):
        timed = compare_latency({n: (e, feeds) for n, e in engines.items()}, rounds=ROUNDS)
        for name in files:
            found[name][label] = round(timed["FP32"].median_ms / timed[name].median_ms, 2)
    for engine in engines.values():
        engine.close()
    return {"batch": len(next(iter(whole.values()))), "faster": found}


PEER_FILES: Mapping[str, str] = {
    "ONNX Runtime quantize_static, defaults": "static.onnx",
    "ONNX Runtime quantize_dynamic, defaults": "dynamic.onnx",
    "ModelOpt, defaults": "modelopt.onnx",
    "ModelOpt, FP32 besides": "modelopt-fp32.onnx",
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
