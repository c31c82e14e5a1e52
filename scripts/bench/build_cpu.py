"""How fast the student of a CPU's bundle is beside its teacher.

    .venv/bin/python scripts/bench/build_cpu.py --work WORK

WORK is a folder that `build.py --work WORK` has filled at the same commit: only what differs for a CPU is
made. Milliseconds are those of the bundle's own latency stage: medians of interleaved rounds, one thread.
Writes docs/bench/build_cpu.json and .md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_store import bench_parser
from build import ROOT, build, bundle_metrics
from quantization_page import stamped

OUT = ROOT / "docs" / "bench" / "build_cpu"
TITLES = {"teacher": "teacher, FP32", "fp32": "student, FP32", "int8": "student, INT8"}
#: How rows of a build are called.
ROWS = {"Teacher": "teacher", "Student, ONNX FP32": "fp32", "Student, INT8": "int8"}


def page(found: dict[str, Any]) -> str:
    """Return the whole page."""
    times = found["latency_ms"]
    lines = [
        "# The student of a CPU's bundle",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}, in the store "
        "of the build that [build.md](build.md) tells of.",
        "",
        "Milliseconds a call in ONNX Runtime, one thread, medians of interleaved rounds; of both towers "
        "together how many times faster than the teacher. INT8 travels only if each pool keeps 0.99 of FP32. "
        "With one relevant image a query, as names have, mAP@10 equals MRR@10.",
        "",
        "| model | image, batch 1 | image, 8 | text, 1 | text, 8 | both, 1 | both, 8 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, title in TITLES.items():
        own = times[model]
        cells = [f"{own[tower][batch]:.2f}" for tower in ("image", "text") for batch in ("1", "8")]
        faster = [_both(times["teacher"], batch) / _both(own, batch) for batch in ("1", "8")]
        cells += [f"{ratio:.1f}x" for ratio in faster]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    tracks = list(found["map10"]["teacher"])
    lines += ["", f"| model | {' | '.join(tracks)} |", f"| --- |{' ---: |' * len(tracks)}"]
    for model, title in TITLES.items():
        scores = [f"{found['map10'][model][track]:.3f}" for track in tracks]
        lines.append(f"| {title} | {' | '.join(scores)} |")
    return "\n".join([*lines, ""])


def _both(towers: dict[str, dict[str, float]], batch: str) -> float:
    return towers["image"][batch] + towers["text"][batch]


def main() -> None:
    """Build, and write both files."""
    parser = bench_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    built = build("default", "cpu", work / "store", work / "cpu")
    times = bundle_metrics(work / "cpu", built)["latency_ms"]
    row = {
        "command": "scripts/bench/build_cpu.py",
        "latency_ms": {model: times[model] for model in TITLES},
        "map10": {
            ROWS[row["title"]]: {track: one["map10"]["value"] for track, one in row["metrics"].items()}
            for row in built["rows"]
            if row["title"] in ROWS
        },
    }
    found = stamped(row)
    OUT.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
