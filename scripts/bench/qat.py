"""What quantization-aware distillation gives back where rounding costs a real student too much.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/qat.py [--steps 200] [--rows "7-bit weights"]

STORE is one in which the recipe `default` was built. Every row quantizes that build's student to files that
ONNX Runtime computes in integers, tunes the student as a build does, exports and quantizes it again by the
same scheme on the same calibration samples, and holds both against the same FP32 student. Writes
docs/bench/qat.json after each row, goes on from it, and writes qat.md.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from bench_store import ROOT, bench_parser, newest, origin

from edgeglm.build.pools import pooled_map10
from edgeglm.build.quantize_stage import calibration_candidates
from edgeglm.build.shipped import load_recipe
from edgeglm.build.tower_scores import TowerScores
from edgeglm.build.tuning import TuningConfig, tuner
from edgeglm.calibration.conversion import file_by_plan, ranges_from_batches, whole_plan
from edgeglm.calibration.preparation import prepared_model
from edgeglm.calibration.schemes import scheme_named
from edgeglm.calibration.sets import CalibrationSet, calibration_set_from_arrays
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import ExportConfig
from edgeglm.core.store import Store
from edgeglm.data.pairs import PairSet
from edgeglm.engines.environment import cpu_flags
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE, TrackMetrics

OUT = ROOT / "docs" / "bench"
NEEDS = ("pairs", "teacher", "targets", "export", "distil-image", "distil-text")
GATE = 0.99


@dataclass(frozen=True)
class Way:
    """The scheme of each tower, what a build says of it, and the bits that tuning rounds weights to."""

    image: str
    text: str
    said: str
    weight_bits: int = 8


ROWS = {
    "7-bit weights": Way(
        "u8s8-chains-reduced", "u8s8-reduced", "what a CPU without dot products gets", weight_bits=7
    ),
    "8-bit weights": Way("u8s8-chains", "u8s8", "what a CPU with dot products gets"),
}


def quantized(fp32: Path, out: Path, way: Way, calibration: CalibrationSet) -> dict[str, Path]:
    """Write both towers whole in INT8, ranges by the largest value."""
    files = {}
    for tower in ("image", "text"):
        prepared = prepared_model(fp32 / f"{tower}.onnx")
        batches = calibration.batches(tower)
        plan = whole_plan(prepared, scheme_named(getattr(way, tower)).name, "max", "fp32")
        files[tower] = out / f"{tower}.onnx"
        file_by_plan(prepared, files[tower], plan, ranges_from_batches(prepared, batches, ("max",)), batches)
    return files


def row(store: Store, way: Way, steps: int) -> dict[str, Any]:
    """Quantize, tune, quantize again; return mAP@10 by pool of each, and the worst pool's share of FP32's."""
    inputs = {kind: newest(store, kind) for kind in NEEDS}
    pairs, exported = PairSet.open(inputs["pairs"]), inputs["export"].path
    scores = TowerScores(pairs, exported, threads=2, seed=0, minimum=GATE)
    fp32 = exported / "models" / "fp32"
    baseline = scores.metrics({tower: fp32 / f"{tower}.onnx" for tower in ("image", "text")})
    found: dict[str, Any] = {"fp32": {"map10": _pools(scores, baseline)}}

    def judged(name: str, files: Mapping[str, Path]) -> None:
        metrics = scores.metrics(files)
        verdict = scores.judged(metrics, baseline)
        found[name] = {
            "map10": _pools(scores, metrics), "kept": verdict.score, "passed": verdict.passed,
            "reason": verdict.reason,
        }  # fmt: skip

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("before", "tuned", "after"):
            (folder / name).mkdir()
        calibration = calibration_set_from_arrays(
            folder / "calibration",
            calibration_candidates(pairs, inputs["targets"].path, exported),
            preprocessing=json.loads((exported / "preprocessing.json").read_text()),
            samples=128,
            seed=0,
        )
        judged("before", quantized(fp32, folder / "before", way, calibration))
        config = TuningConfig(
            student=load_recipe("default").student,
            export=ExportConfig(),
            steps=steps,
            weight_bits=way.weight_bits,
        )
        before = resource.getrusage(resource.RUSAGE_SELF)
        tune = tuner(inputs, config, seed=0, threads=2, progress=QuietProgress())
        for tower in ("image", "text"):
            tune(folder / "tuned", tower)
        after = resource.getrusage(resource.RUSAGE_SELF)
        found["cpu_s"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        judged("tuned in FP32", {t: folder / "tuned" / f"{t}.onnx" for t in ("image", "text")})
        judged("after", quantized(folder / "tuned", folder / "after", way, calibration))
    return found


def _pools(scores: TowerScores, metrics: Mapping[str, Any]) -> dict[str, float]:
    typed = msgspec.convert(dict(metrics), dict[str, TrackMetrics])
    return {pool: pooled_map10(typed, members) for pool, members in scores.pools.items()}


def table(found: dict[str, Any]) -> str:
    """Return the page."""
    rows = {name: found["rows"][name] for name in ROWS if name in found["rows"]}
    pools = list(next(iter(rows.values()))["fp32"]["map10"])
    lines = [
        "# Quantization-aware distillation",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}; of the processor's "
        f"instructions for INT8: {', '.join(found['flags']) or 'none'}.",
        "",
        f"mAP@10 of the FP32 student of a default build and of its INT8 files as ONNX Runtime computes them, "
        f"both towers whole in INT8, one seed; tuned: {found['steps']} steps a tower, rounded, on the cached "
        f"targets. 'kept' is the worst pool's share of the FP32 student's, and the gate is {GATE:g}. "
        f"{ONE_RELEVANT_NOTE}",
        "",
        f"| scheme | student | {' | '.join(pools)} | kept | gate | CPU s |",
        f"| --- | --- |{' ---: |' * len(pools)} ---: | --- | ---: |",
    ]
    titles = {"fp32": "FP32", "before": "INT8", "tuned in FP32": "tuned, FP32", "after": "tuned, INT8"}
    for name, one in rows.items():
        way = ROWS[name]
        for key, title in titles.items():
            cells = " | ".join(f"{one[key]['map10'][pool]:.3f}" for pool in pools)
            kept = f"{one[key]['kept']:.4f}" if "kept" in one[key] else "1"
            gate = "passes" if one[key].get("passed", True) else "misses"
            cost = one["cpu_s"] if key == "after" else "-"
            said = f"{name}: {way.image}, {way.text}; {way.said}" if key == "fp32" else ""
            lines.append(f"| {said} | {title} | {cells} | {kept} | {gate} | {cost} |")
    return "\n".join([*lines, "", *found.get("notes", []), ""])


def main() -> None:
    """Run what is missing, then write the table."""
    parser = bench_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    path = OUT / "qat.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    found |= {
        "command": f"scripts/bench/qat.py --steps {options.steps}",
        "steps": options.steps,
        "flags": sorted(flag for flag in cpu_flags() if "vnni" in flag or flag in ("asimddp", "i8mm")),
        **origin(),
    }
    store = Store(Path(os.environ["EDGEGLM_STORE"]))
    for name in options.rows:
        if name not in found["rows"]:
            found["rows"][name] = row(store, ROWS[name], options.steps)
            path.write_text(json.dumps(found, indent=1) + "\n")
    path.write_text(json.dumps(found, indent=1) + "\n")
    (OUT / "qat.md").write_text(table(found))


if __name__ == "__main__":
    main()
