"""A new domain of 1,000 pairs, from a folder of one's own to a student, timed.

    .venv/bin/python scripts/bench/new_domain.py [--pairs 1000] [--set key=value ...]

The pairs are icons of Game-icons.net (npm `@iconify-json/game-icons`, CC-BY-3.0), which no recipe knows: one
black drawing on white each, its name as caption, drawn at random by a fixed seed. They are written as PNG
files and a `pairs.jsonl`, as a user would have them, and `edgeglm build --data FOLDER --target jetson-agx`
runs in a fresh store that has the pretrained weights and nothing else. Writes docs/bench/new_domain.json and
.md: seconds of each stage by the wall clock, and processor seconds of the whole, which other programs change
less.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_store import ROOT, bench_parser, origin
from measured_row import interval_words

from edgeglm.adapt.sources import teacher_inputs
from edgeglm.assets import asset_member, fetch_asset
from edgeglm.build.shipped import load_recipe
from edgeglm.core.progress import QuietProgress
from edgeglm.core.store import Store, default_store_root
from edgeglm.data.concepts import text_of
from edgeglm.data.iconsets import icon_set_from_json, rgb_from_svg
from edgeglm.data.splits import hashed_order
from edgeglm.distill.stages import student_inputs
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE

ICONS = (
    "npm:@iconify-json/game-icons@1.2.4"
    "#sha256=f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4"
)
SIDE = 144
AIM_S = 480
#: Stages of each part that the aim is about; the others pack what these made.
PARTS = {
    "adapt": ("pairs", "backbones", "features", "teacher", "teacher-evaluation"),
    "distil": ("targets", "distil-text", "distil-image", "distil-evaluation"),
}


def write_domain(folder: Path, count: int, store: Store) -> None:
    """Write ``count`` pictures and their captions."""
    from PIL import Image

    asset = fetch_asset(ICONS, store, QuietProgress())
    icons = icon_set_from_json(asset_member(asset, "package/icons.json"), b"{}")
    names = [name for name in icons.icons if not any(letter.isdigit() for letter in name)]
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for name in hashed_order(names, seed=0, purpose="new domain")[:count]:
        file = f"pictures/{name}.png"
        Image.fromarray(rgb_from_svg(icons.icons[name], SIDE)).save(folder / file)
        lines.append(json.dumps({"image": file, "text": text_of(name)}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def store_with_weights(root: Path) -> Store:
    """Make a store that holds the downloads of the recipe `default`, copied from the user's own."""
    recipe, shared, own = load_recipe("default"), Store(default_store_root()), Store(root)
    fetched = {
        **teacher_inputs(recipe.teacher, shared, QuietProgress()),
        **student_inputs(recipe.student, shared, QuietProgress()),
    }
    for entry in {artifact.path.parent for artifact in fetched.values()}:
        shutil.copytree(entry, own.root / "entries" / entry.name)
    return own


def measured(count: int, sets: list[str]) -> dict[str, Any]:
    """Build from a folder and return what is published."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_domain(folder / "domain", count, Store(default_store_root()))
        store = store_with_weights(folder / "store")
        more = [part for value in sets for part in ("--set", value)]
        arguments = ["build", "--data", "domain", "--target", "jetson-agx", *more]
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "edgeglm.cli.main", *arguments, "--json"],
            cwd=folder,
            env={**os.environ, "EDGEGLM_STORE": str(store.root)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the build ended with {done.returncode}")
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        said = json.loads(done.stdout)
        ratios = json.loads((folder / said["bundle"] / "metrics.json").read_text("utf-8"))["ratios"]
    seconds = {stage["stage"]: stage["seconds"] for stage in said["stages"]}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    parts = {part: round(sum(seconds[name] for name in names), 1) for part, names in PARTS.items()}
    return {
        "command": " ".join(["scripts/bench/new_domain.py", f"--pairs {count}", *more]),
        "build": "edgeglm " + " ".join(arguments),
        **origin(),
        "pairs": count,
        "load_average": round(os.getloadavg()[0], 1),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "parts_s": parts,
        "stages_s": seconds,
        "rows": {row["title"]: row["metrics"] for row in said["rows"] if row["metrics"]},
        "ratios": ratios,
    }


def page(found: dict[str, Any]) -> str:
    """Return the page."""
    both = sum(found["parts_s"].values())
    lines = [
        "# A new domain of one's own",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}, load average "
        f"{found['load_average']} at the end: `{found['build']}` over {found['pairs']:,} icons of "
        "Game-icons.net, a store with the pretrained weights and nothing else.",
        "",
        "| what | seconds | aim |",
        "| --- | ---: | ---: |",
        f"| adapt: pairs to the evaluated teacher | {found['parts_s']['adapt']:.0f} | |",
        f"| distil: targets to the evaluated student | {found['parts_s']['distil']:.0f} | |",
        f"| both, by the wall clock | {both:.0f} | {AIM_S} |",
        f"| the whole build, bundle and all | {found['wall_s']:.0f} | |",
        f"| the same in processor seconds, all cores added | {found['cpu_s']:.0f} | |",
        "",
        "A load average above the number of cores means that other programs ran too: the wall clock is then "
        "an upper bound. Half of the processor seconds are what two cores of one's own need at least.",
        "",
        "| stage | seconds |",
        "| --- | ---: |",
        *(f"| {name} | {value:.1f} |" for name, value in found["stages_s"].items()),
        "",
        "Held out: a tenth of the pictures, asked for by their captions, mAP@10 with its 95 % interval. "
        f"{ONE_RELEVANT_NOTE}",
        "",
        "| model | mAP@10 | R@10 | queries | gallery |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for title, metrics in found["rows"].items():
        for track in metrics.values():
            lines.append(
                f"| {title} | {interval_words(track['map10'])} | {track['r10']:.3f} | {track['queries']} | "
                f"{track['gallery']} |"
            )
    kept = found["ratios"]["pools"].get("names")
    if kept:
        lines += ["", f"Student / teacher: {interval_words(kept)}."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, or only write the page anew."""
    parser = bench_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--set", action="append", default=[], help="passed to the build")
    parser.add_argument("--table", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    out = ROOT / "docs" / "bench"
    if not options.table:
        found = measured(options.pairs, options.set)
        (out / "new_domain.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (out / "new_domain.md").write_text(
        page(json.loads((out / "new_domain.json").read_text("utf-8"))), "utf-8"
    )


if __name__ == "__main__":
    main()
