"""The whole build, timed: cold with downloads aside, unchanged, and with another target.

    .venv/bin/python scripts/bench/build.py --twice --output docs/bench/build
    .venv/bin/python scripts/bench/build.py --seeds 1 2 --output docs/bench/build

Writes build.json, build.md and build.txt, which is what the cold run said; `scripts/readme-figures` puts them
into both READMEs. A fresh store gets the downloads first; the cold run then makes everything
else. `--twice` makes a second cold run in another folder and holds the two content digests together.
Wall times are of this machine; the ratios in the second table do not hang on it. With `--seeds` no time is
taken: the whole build is made once for each of them, split, teacher and student alike, and its ratios join
those of the files that are there.
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
from typing import Any, NamedTuple

from measured_row import interval_words
from memory_of_all import PERIOD_S, PeakOfAll

ROOT = Path(__file__).resolve().parent.parent.parent
EDGEGLM = Path(sys.executable).with_name("edgeglm")
HELP_ROUNDS = 9
RATIO_AIM = 0.96
SEEDLESS = ("--work",)  # options that say where, not what
FETCH = """
from edgeglm.build.shipped import load_recipe
from edgeglm.build.sources import sources_of, teacher_rooms
from edgeglm.core.progress import QuietProgress
from edgeglm.core.store import Store, default_store_root
recipe = load_recipe({recipe!r})
sources_of(recipe, teacher_rooms(recipe), Store(default_store_root()), QuietProgress())
"""


class Run(NamedTuple):
    """A process that ended: its seconds, the GB of its largest process and of all at once, its stdout."""

    seconds: float
    peak_gb: float
    all_gb: float
    output: str


def timed(arguments: list[str], store: Path, folder: Path) -> Run:
    """Run a process to its end. The largest process is the kernel's figure, all at once is sampled."""
    started = time.perf_counter()
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env={**os.environ, "EDGEGLM_STORE": str(store), "COLUMNS": "110"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with PeakOfAll(process.pid) as sampled:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments} failed with status {status}")
    seconds = time.perf_counter() - started
    return Run(seconds, usage.ru_maxrss * 1024 / 1e9, sampled.peak_bytes / 1e9, output)


def build(recipe: str, target: str, store: Path, folder: Path, *more: str) -> dict[str, Any]:
    """Run one build; return its JSON with wall seconds and peak memory."""
    folder.mkdir(exist_ok=True, parents=True)
    ran = timed(
        [str(EDGEGLM), "build", "--recipe", recipe, "--target", target, "--json", *more], store, folder
    )
    found: dict[str, Any] = json.loads(ran.output)
    return {**found, "wall_seconds": round(ran.seconds, 1), "peak_gb": round(ran.peak_gb, 2)}


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


def bundle_metrics(folder: Path, built: dict[str, Any]) -> dict[str, Any]:
    """Return metrics.json of the bundle that a build wrote."""
    found: dict[str, Any] = json.loads((folder / built["bundle"] / "metrics.json").read_text())
    return found


def seed_ratios(metrics: dict[str, Any]) -> dict[str, float]:
    """Return student / teacher by track and by pool."""
    both = {**metrics["ratios"]["tracks"], **metrics["ratios"]["pools"]}
    return {name: ratio["value"] for name, ratio in both.items()}


def command_line() -> str:
    """Return the command as it was given, without the options that say where."""
    words = ["python", "scripts/bench/build.py"]
    rest = iter(sys.argv[1:])
    for word in rest:
        if word in SEEDLESS:
            next(rest, None)
        else:
            words.append(word)
    return " ".join(words)


def commit() -> str:
    """Return the short commit, with a mark where the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "edgeglm", "calibration", "export")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def page(found: dict[str, Any]) -> str:
    """Return the tables as markdown."""
    lines = [
        f"# The whole build, recipe {found['recipe']}",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}, two threads.",
        *(
            [f"Other seeds: `{found['seeds_command']}` at commit {found['seeds_commit']}."]
            if "seeds_command" in found
            else []
        ),
        f"Downloads were done before. One run each; the help is the median of {HELP_ROUNDS}.",
        "",
        "| what | measured | aim |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {row['what']} | {row['measured']} | {row['aim']} |" for row in found["rows"]]
    lines += ["", *found["notes"]] if "notes" in found else []
    lines += [
        "",
        "mAP@10 with its 95 % bootstrap interval, that of the ratio over the same queries for both. With one "
        "relevant image a query, mAP@10 equals MRR@10.",
        "",
        "| track | queries | images | teacher | student | student / teacher | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in found["tracks"]:
        cells = [interval_words(row["teacher"]), interval_words(row["student"])]
        lines.append(
            f"| {row['track']} | {row['queries']:,} | {row['gallery']:,} | {cells[0]} | {cells[1]} "
            f"| {interval_words(row['ratio'])} | {verdict(row['ratio'])} |"
        )
    lines += ["", "| pooled over queries | queries | student / teacher | |", "| --- | ---: | ---: | --- |"]
    lines += [
        f"| {pool} | {found['pool_queries'][pool]:,} | {interval_words(ratio)} | {verdict(ratio)} |"
        for pool, ratio in found["pools"].items()
    ]
    if len(found.get("seeds", {})) > 1:
        lines += seed_lines(found["seeds"])
    lines += cost_lines(found)
    return "\n".join([*lines, ""])


def verdict(ratio: dict[str, float]) -> str:
    """Say whether a ratio reaches the aim, and whether its interval settles that."""
    if ratio["value"] >= RATIO_AIM:
        return "reached" if ratio["low"] >= RATIO_AIM else "reached; the interval reaches below"
    return "missed" if ratio["high"] < RATIO_AIM else "missed; the interval reaches it"


def seed_lines(seeds: dict[str, dict[str, float]]) -> list[str]:
    """Return the table of whole builds with other seeds."""
    names = sorted(seeds, key=int)
    lines = [
        "",
        f"Student / teacher of whole builds with {len(names)} seeds: split, teacher and student differ.",
        "",
        f"| track or pool | {' | '.join(f'seed {name}' for name in names)} | mean | deviation |",
        f"| --- | {' | '.join('---:' for _ in names)} | ---: | ---: |",
    ]
    for track in seeds[names[0]]:
        values = [seeds[name][track] for name in names]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {track} | {cells} | {statistics.mean(values):.3f} | {spread:.3f} |")
    return lines


def cost_lines(found: dict[str, Any]) -> list[str]:
    """Return parameters by tower, and the milliseconds of each model."""
    towers, latency = found["towers"], found["latency_ms"]
    lines = [
        "",
        "Embeddings counted.",
        "",
        "| parameters | teacher | student | fewer |",
        "| --- | ---: | ---: | ---: |",
    ]
    total = {model: sum(tower["parameters"] for tower in parts.values()) for model, parts in towers.items()}
    counts = {
        name: {model: towers[model][name]["parameters"] for model in towers} for name in towers["teacher"]
    }
    for name, count in {**counts, "total": total}.items():
        details = ""
        if name in towers["teacher"]:
            details = f": {towers['teacher'][name]['detail']} against {towers['student'][name]['detail']}"
        lines.append(
            f"| {name}{details} | {count['teacher'] / 1e6:.2f} M | {count['student'] / 1e6:.2f} M "
            f"| {count['teacher'] / count['student']:.2f}x |"
        )
    lines += [
        "",
        "Milliseconds a call in ONNX Runtime, one thread, all models interleaved in one run; in brackets "
        f"how many times faster than the teacher. A text has {found['latency_tokens']} tokens, an image the "
        "resolution of its tower above; total is one image and one text.",
        "",
        "| model, batch | image, 1 | image, 8 | text, 1 | text, 8 | total, 1 | total, 8 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in sorted(latency, key=lambda name: (name != "teacher", name)):
        cells = []
        for parts, batch in (*((("image",), b) for b in "18"), *((("text",), b) for b in "18"),
                             *((("image", "text"), b) for b in "18")):  # fmt: skip
            value, reference = (sum(latency[m][part][batch] for part in parts) for m in (model, "teacher"))
            cells.append(f"{value:.2f} ({reference / value:.1f}x)")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run what was asked for and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--work", type=Path, help="keep store and bundles here")
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", help="build these seeds instead, untimed")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="edgeglm-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    store, path = work / "store", given.output.with_suffix(".json")
    timed([sys.executable, "-c", FETCH.format(recipe=given.recipe)], store, work)
    if given.seeds:
        found = json.loads(path.read_text())
        for seed in given.seeds:
            folder = work / f"seed-{seed}"
            sets = ("--set", f"seed={seed}", "--set", "gates.student_ratio=0.0")
            built = build(given.recipe, "jetson-agx", store, folder, *sets)
            found["seeds"][str(seed)] = seed_ratios(bundle_metrics(folder, built))
            found["seeds_command"], found["seeds_commit"] = command_line(), commit()
            path.write_text(json.dumps(found, indent=1) + "\n")
    else:
        found = measured(given, store, work)
        path.write_text(json.dumps(found, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(page(found))


def measured(given: argparse.Namespace, store: Path, work: Path) -> dict[str, Any]:
    """Time the builds; return everything that the files say."""
    (work / "cold").mkdir(parents=True, exist_ok=True)
    command = [str(EDGEGLM), "build", "--recipe", given.recipe, "--target", "jetson-agx"]
    cold = timed(command, store, work / "cold")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    said = cold.output.replace(f"{work / 'cold'}/", "")  # as a person sees it who builds in that folder
    lines = [line.rstrip() for line in said.splitlines()]
    given.output.with_suffix(".txt").write_text("\n".join([*lines, ""]))
    warm = build(given.recipe, "jetson-agx", store, work / "cold")
    other = build(given.recipe, "t4", store, work / "cold")
    helped = statistics.median(
        timed([str(EDGEGLM), "--help"], store, work).seconds for _ in range(HELP_ROUNDS)
    )
    ran = [stage["stage"] for stage in other["stages"] if not stage["reused"]]
    metrics = bundle_metrics(work / "cold", warm)
    manifest = json.loads((work / "cold" / warm["bundle"] / "manifest.json").read_text())
    aim = "600 s" if given.recipe == "default" else "-"
    rows = [
        {"what": "cold build, jetson-agx", "measured": f"{cold.seconds:.0f} s", "aim": aim},
        {"what": "nothing changed", "measured": f"{warm['wall_seconds']:.1f} s", "aim": "5 s"},
        {
            "what": f"another target, t4 (reran {', '.join(ran)})",
            "measured": f"{other['wall_seconds']:.1f} s",
            "aim": "-",
        },
        {"what": "peak memory of one process", "measured": f"{cold.peak_gb:.1f} GB", "aim": "6 GB"},
        *all_processes(cold),
        {"what": "edgeglm --help", "measured": f"{helped:.2f} s", "aim": "0.3 s"},
    ]
    if given.twice:
        again = build(given.recipe, "jetson-agx", _assets_only(store, work / "store2"), work / "again")
        same = again["content_digest"] == warm["content_digest"]
        rows.append({"what": "two cold builds agree in their digest", "measured": str(same), "aim": "True"})
    tracks = kept(warm["rows"], metrics["ratios"])
    queries = {row["track"]: row["queries"] for row in tracks}
    pools = metrics["ratios"]["pools"]
    return {
        "recipe": given.recipe,
        "command": command_line(),
        "commit": commit(),
        "machine": f"{os.cpu_count()} shared {platform.machine()} CPU cores, no GPU",
        "rows": rows,
        "tracks": tracks,
        "pools": pools,
        "pool_queries": {
            pool: sum(count for track, count in queries.items() if in_pool(track, pool)) for pool in pools
        },
        "seeds": {"0": seed_ratios(metrics)},
        "latency_ms": metrics["latency_ms"],
        "latency_tokens": metrics["latency_tokens"],
        "towers": metrics["towers"],
        "stages": [{"stage": stage["name"], "seconds": stage["seconds"]} for stage in manifest["stages"]],
        "content_digest": warm["content_digest"],
        "peak_gb_children": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
    }


def all_processes(ran: Run) -> list[dict[str, Any]]:
    """Return the row of the memory of all processes at once; none where this kernel does not tell it."""
    what = f"peak memory, all processes (PSS, every {PERIOD_S:g} s)"
    return [{"what": what, "measured": f"{ran.all_gb:.1f} GB", "aim": "6 GB"}] if ran.all_gb else []


def in_pool(track: str, pool: str) -> bool:
    """Return whether a track belongs to a pool of the report."""
    keywords = track.endswith("-keywords")
    return {
        "names": not keywords and track != "unseen",
        "unseen names": track == "unseen",
        "all names": not keywords,
        "keywords": keywords,
    }[pool]


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
