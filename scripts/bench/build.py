"""The whole build, timed: cold with downloads aside, unchanged, and with another target.

    .venv/bin/python scripts/bench/build.py --output docs/bench/build

Writes build.json and build.md. A fresh store gets the downloads first; the cold run then makes everything
else. `--twice` makes a second cold run in another folder and holds the two content digests together.
Wall times are of this machine; the ratios in the second table do not hang on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
EDGEGLM = Path(sys.executable).with_name("edgeglm")
HELP_ROUNDS = 9
CATALOGUE_KEYWORDS = ("catalogue-transductive-keywords", "catalogue-inductive-keywords")
FETCH = """
from edgeglm.adapt.stages import teacher_inputs
from edgeglm.build.shipped import load_recipe
from edgeglm.core.progress import QuietProgress
from edgeglm.core.store import Store, default_store_root
from edgeglm.data.sources import pairs_inputs
recipe, store, quiet = load_recipe({recipe!r}), Store(default_store_root()), QuietProgress()
pairs_inputs(recipe.data, store, quiet)
teacher_inputs(recipe.teacher, store, quiet)
"""


def timed(arguments: list[str], store: Path, folder: Path) -> tuple[float, float, str]:
    """Run a process; return its seconds, the peak resident GB of it and its children, and its stdout."""
    started = time.perf_counter()
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env={**os.environ, "EDGEGLM_STORE": str(store)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments} failed with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6, output


def build(recipe: str, target: str, store: Path, folder: Path) -> dict[str, Any]:
    """Run one build; return its JSON with wall seconds and peak memory."""
    folder.mkdir(exist_ok=True)
    seconds, peak, output = timed(
        [str(EDGEGLM), "build", "--recipe", recipe, "--target", target, "--json"], store, folder
    )
    found: dict[str, Any] = json.loads(output)
    return {**found, "wall_seconds": round(seconds, 1), "peak_gb": round(peak, 2)}


def kept(rows: list[dict[str, Any]], ratios: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for each track, teacher and student mAP@10 and their ratio, all with intervals."""
    by_title = {row["title"]: row["metrics"] for row in rows}
    teacher, student = by_title["Teacher"], by_title["Student, ONNX FP32"]
    return [
        {
            "track": track,
            "queries": teacher[track]["queries"],
            "gallery": teacher[track]["gallery"],
            "teacher": teacher[track]["map10"],
            "student": student[track]["map10"],
            "ratio": ratios["tracks"][track],
        }
        for track in teacher
    ]


def ratios_of(recipe: str, store: Path) -> dict[str, Any]:
    """Return student / teacher mAP@10 by track and pooled over queries, each with its paired interval."""
    import msgspec
    import numpy as np

    from edgeglm.build.evaluations import read_preprocessing
    from edgeglm.build.pipeline import plan_build
    from edgeglm.build.shipped import load_recipe
    from edgeglm.core.artifact import Artifact
    from edgeglm.core.progress import QuietProgress
    from edgeglm.core.store import Store
    from edgeglm.data.pairs import PairSet
    from edgeglm.data.tokenization import Tokenizer, teacher_tokenizer
    from edgeglm.evaluate.retrieval import average_precisions, positions_in_gallery, ratio_of_means
    from edgeglm.evaluate.towers import TextSettings, text_embeddings, towers_on_tracks
    from edgeglm.targets.schema import load_target

    opened = Store(store)
    made: dict[str, Artifact] = {}
    plan = plan_build(load_recipe(recipe), load_target("jetson-agx"), opened, QuietProgress())
    for node in plan.nodes:
        inputs = plan.inputs_of(node, made)
        assert inputs is not None
        found = opened.get(node.stage.key(inputs))
        assert found is not None, f"{node.name} is not in the store"
        made[node.name] = found
    pairs, teacher, exported = PairSet.open(made["pairs"]), made["teacher"].path, made["export"].path
    queries = sorted({query.text for track in pairs.tracks for query in track.queries})
    place = {text: i for i, text in enumerate(queries)}
    preprocessing = read_preprocessing(exported)
    tokenizer, settings = teacher_tokenizer(teacher)
    said = TextSettings(tokenizer=tokenizer, max_length=settings.max_length)
    student_said = TextSettings(
        tokenizer=Tokenizer(exported / "tokenizer.json", lowercase=preprocessing.text.lowercase),
        max_length=preprocessing.text.max_length,
    )
    files = {tower: exported / "models" / "fp32" / f"{tower}.onnx" for tower in ("image", "text")}
    _, image_ND = towers_on_tracks(
        files, pairs.tracks, pairs.images, resolution=preprocessing.image.resolution, text=student_said,
        threads=2, seed=0,
    )  # fmt: skip
    sides = {
        "teacher": (
            text_embeddings(teacher / "text.onnx", queries, said, threads=2),
            np.load(teacher / "image_embeddings.npy", mmap_mode="r")[0],
        ),
        "student": (text_embeddings(files["text"], queries, student_said, threads=2), image_ND),
    }
    by_track = {
        track.name: {
            side: average_precisions(
                text_QD[[place[query.text] for query in track.queries]],
                images[np.asarray(track.gallery)],
                positions_in_gallery(track),
            )
            for side, (text_QD, images) in sides.items()
        }
        for track in pairs.tracks
    }
    pools = {
        "names, all tracks": [name for name in by_track if not name.endswith("-keywords")],
        "keywords, catalogue": [name for name in by_track if name in CATALOGUE_KEYWORDS],
        "keywords, all tracks": [name for name in by_track if name.endswith("-keywords")],
    }

    def ratio(names: list[str]) -> Any:
        student, teacher = (
            np.concatenate([by_track[name][side] for name in names]) for side in ("student", "teacher")
        )
        return msgspec.to_builtins(ratio_of_means(student, teacher)) | {"queries": len(student)}

    return {
        "tracks": {name: ratio([name]) for name in by_track},
        "pools": {pool: ratio(names) for pool, names in pools.items() if names},
    }


def page(found: dict[str, Any]) -> str:
    """Return the tables as markdown."""
    lines = [
        f"# The whole build, recipe {found['recipe']}",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}, two threads.",
        f"Downloads were done before. One run each; the help is the median of {HELP_ROUNDS}.",
        "",
        "| what | measured | aim |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {row['what']} | {row['measured']} | {row['aim']} |" for row in found["rows"]]
    lines += [
        "",
        "mAP@10 with its 95 % bootstrap interval, that of the ratio over the same queries for both. With one "
        "relevant image a query, mAP@10 equals MRR@10.",
        "",
        "| track | queries | images | teacher | student | student / teacher |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["tracks"]:
        cells = [_between(row["teacher"]), _between(row["student"])]
        lines.append(
            f"| {row['track']} | {row['queries']:,} | {row['gallery']:,} | {cells[0]} | {cells[1]} "
            f"| {_between(row['ratio'])} |"
        )
    lines += ["", "| pooled over queries | queries | student / teacher |", "| --- | ---: | ---: |"]
    lines += [
        f"| {pool} | {ratio['queries']:,} | {_between(ratio)} |" for pool, ratio in found["pools"].items()
    ]
    lines += [
        "",
        "Milliseconds a call in ONNX Runtime, one thread, all models interleaved in one run; in brackets "
        "how many times faster than the teacher.",
        "",
        "| model | image, batch 1 | image, batch 8 | text, batch 1 | text, batch 8 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    latency = found["latency_ms"]
    for model in sorted(latency, key=lambda name: (name != "teacher", name)):
        cells = []
        for tower, batch in (("image", "1"), ("image", "8"), ("text", "1"), ("text", "8")):
            value, reference = latency[model][tower][batch], latency["teacher"][tower][batch]
            cells.append(f"{value:.2f} ({reference / value:.1f}x)")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _between(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def main() -> None:
    """Run everything and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--work", type=Path, help="keep store and bundles here")
    parser.add_argument("--twice", action="store_true")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="edgeglm-bench-"))
    store = work / "store"
    timed([sys.executable, "-c", FETCH.format(recipe=given.recipe)], store, work)
    cold = build(given.recipe, "jetson-agx", store, work / "cold")
    warm = build(given.recipe, "jetson-agx", store, work / "cold")
    other = build(given.recipe, "t4", store, work / "cold")
    helped = statistics.median(timed([str(EDGEGLM), "--help"], store, work)[0] for _ in range(HELP_ROUNDS))
    ran = [stage["stage"] for stage in other["stages"] if not stage["reused"]]
    metrics = json.loads((work / "cold" / cold["bundle"] / "metrics.json").read_text())
    ratios = ratios_of(given.recipe, store)
    rows = [
        {"what": "cold build, jetson-agx", "measured": f"{cold['wall_seconds']:.0f} s", "aim": "600 s"},
        {"what": "nothing changed", "measured": f"{warm['wall_seconds']:.1f} s", "aim": "5 s"},
        {
            "what": f"another target, t4 (reran {', '.join(ran)})",
            "measured": f"{other['wall_seconds']:.1f} s",
            "aim": "-",
        },
        {"what": "peak memory of one process", "measured": f"{cold['peak_gb']:.1f} GB", "aim": "6 GB"},
        {"what": "edgeglm --help", "measured": f"{helped:.2f} s", "aim": "0.3 s"},
    ]
    if given.twice:
        again = build(given.recipe, "jetson-agx", _assets_only(store, work / "store2"), work / "again")
        same = again["content_digest"] == cold["content_digest"]
        rows.append({"what": "two cold builds agree in their digest", "measured": str(same), "aim": "True"})
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    found = {
        "recipe": given.recipe,
        "command": f"python scripts/bench/build.py --recipe {given.recipe}",
        "commit": commit,
        "machine": f"{os.cpu_count()} shared {platform.machine()} CPU cores, no GPU",
        "rows": rows,
        "tracks": kept(cold["rows"], ratios),
        "pools": ratios["pools"],
        "latency_ms": metrics["latency_ms"],
        "stages": cold["stages"],
        "content_digest": cold["content_digest"],
        "peak_gb_children": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(page(found))


def _assets_only(store: Path, other: Path) -> Path:
    """Make a second store that has the downloads of the first and nothing else."""
    import shutil

    (other / "entries").mkdir(parents=True)
    for entry in (store / "entries").iterdir():
        if json.loads((entry / "entry.json").read_text())["kind"] == "asset":
            shutil.copytree(entry, other / "entries" / entry.name)
    return other


if __name__ == "__main__":
    main()
