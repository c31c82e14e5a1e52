"""What the fused re-ranker adds to the towers of a real build, and what 50 candidates cost.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/rerank.py [--rows "the recipe's"]

STORE is one in which the recipe `default` was built; each row trains a re-ranker for that build's student by
the build's own stages and asks every query of every track with and without it. Writes
docs/bench/rerank.json after each row, goes on from it, and writes rerank.md.
"""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import msgspec
from bench_store import ROOT, bench_parser, newest, origin

from edgeglm.build.reranker_stage import (
    RerankerEvaluation,
    RerankerEvaluationConfig,
    RerankerStage,
    RerankerStageConfig,
)
from edgeglm.build.shipped import load_recipe
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import ExportConfig, RerankerConfig
from edgeglm.core.stage import Context
from edgeglm.core.store import Store
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE

OUT = ROOT / "docs" / "bench"
ON = RerankerConfig(enabled=True)
STUDENT = load_recipe("default").student
ROWS: dict[str, tuple[RerankerConfig, str]] = {
    "the recipe's": (ON, "teacher and labels, two layers of 96"),
    "teacher alone": (msgspec.structs.replace(ON, label_weight=0.0), "no labels"),
    "labels, sharper": (
        msgspec.structs.replace(ON, label_weight=1.0, temperature=0.02, steps=600),
        "labels as heavy as the teacher, temperature 0.02, twice the steps",
    ),
    "larger": (
        msgspec.structs.replace(ON, width=192, depth=3, steps=900, learning_rate=5e-4),
        "three layers of 192, thrice the steps",
    ),
}
NEEDS = ("pairs", "teacher", "targets", "export", "distil-image", "distil-text")


def row(store: Store, config: RerankerConfig) -> dict[str, Any]:
    """Train, evaluate; return what both stages measured, and CPU seconds of the training stage."""
    inputs = {kind: newest(store, kind) for kind in NEEDS}
    context = Context(store=store, progress=QuietProgress(), threads=2)
    stage = RerankerStage(
        RerankerStageConfig(
            reranker=config,
            export=ExportConfig(),
            size=STUDENT.size,
            resolution=STUDENT.resolution,
            seed=0,
        )
    )
    before = resource.getrusage(resource.RUSAGE_SELF)
    made = stage(inputs, context)
    after = resource.getrusage(resource.RUSAGE_SELF)
    asked = {"pairs": inputs["pairs"], "export": inputs["export"], "reranker": made.artifact}
    found = RerankerEvaluation(RerankerEvaluationConfig(seed=0))(asked, context)
    measured = made.artifact.provenance["measured"]
    return {
        **found.artifact.provenance["measured"],
        "config": msgspec.to_builtins(config),
        "parameters": measured["parameters"],
        "loss": [measured["loss"][0], measured["loss"][-1]],
        "parity": measured["parity"],
        "cpu_s": None
        if made.reused
        else round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
    }


def table(found: dict[str, Any]) -> str:
    """Return the page."""
    rows: dict[str, Any] = {name: found["rows"][name] for name in ROWS if name in found["rows"]}
    tracks = list(next(iter(rows.values()))["tracks"])
    first = next(iter(rows.values()))
    without = " | ".join(f"{first['tracks'][track]['without']:.3f}" for track in tracks)
    lines = [
        "# The fused re-ranker",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}.",
        "",
        f"mAP@10 of the FP32 towers of a default build (one seed), and with their first "
        f"{first['candidates']} images ordered anew; beside it the ratio with its paired 95 % interval over "
        "the queries. CPU s is of the whole training stage: patches, training, export. Milliseconds are of "
        "all candidates in one call, one thread of ONNX Runtime; beside it those of the text tower. "
        f"{ONE_RELEVANT_NOTE}",
        "",
        f"| re-ranker | {' | '.join(tracks)} | trained M | CPU s | ms | ms text tower |",
        f"| --- |{' ---: |' * len(tracks)} ---: | ---: | ---: | ---: |",
        f"| none | {without} | - | - | - | - |",
    ]
    for name, one in rows.items():
        cells = []
        for track in tracks:
            ratio = one["tracks"][track]["ratio"]
            cells.append(
                f"{one['tracks'][track]['with']:.3f} ({ratio['value']:.3f}: "
                f"{ratio['low']:.3f} to {ratio['high']:.3f})"
            )
        latency = one["latency_ms"]
        lines.append(
            f"| {name}: {ROWS[name][1]} | {' | '.join(cells)} | {one['parameters'] / 1e6:.2f} "
            f"| {one['cpu_s'] or '-'} | {latency['reranker']:.1f} | {latency['text']:.2f} |"
        )
    return "\n".join([*lines, "", *found.get("notes", []), ""])


def main() -> None:
    """Run what is missing, then write the table."""
    parser = bench_parser(__doc__)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    path = OUT / "rerank.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    found |= {"command": "scripts/bench/rerank.py", **origin()}
    store = Store(Path(os.environ["EDGEGLM_STORE"]))
    for name in options.rows:
        if name not in found["rows"]:
            found["rows"][name] = row(store, ROWS[name][0])
            path.write_text(json.dumps(found, indent=1) + "\n")
    path.write_text(json.dumps(found, indent=1) + "\n")
    (OUT / "rerank.md").write_text(table(found))


if __name__ == "__main__":
    main()
