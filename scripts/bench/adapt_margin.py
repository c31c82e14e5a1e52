"""Teachers whose plain view has a margin of background, beside those that fill the square.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/adapt_margin.py [--seeds 3]

STORE is one in which the recipe `default` was built. The plain view is made anew with each margin, of all
pictures alike, those that train and those that are sought; the augmented views stay. Compared as
`adapt.py` compares ways: on projected features with a frozen text tower. Writes docs/bench/adapt_margin.json
after each run, goes on from it when called again, and writes adapt_margin.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import adapt  # noqa: E402
from adapt_auxiliary import TITLES, row  # noqa: E402
from adapt_heads import CONFIG, member  # noqa: E402
from bench_store import (  # noqa: E402
    Share,
    add_seeds,
    add_share,
    bench_parser,
    kept_figures,
    newest,
    origin,
)

from edgeglm.adapt import batches  # noqa: E402
from edgeglm.adapt.backbones import read_backbones  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine  # noqa: E402
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE  # noqa: E402

OUT = ROOT / "docs" / "bench"
MARGINS = (0.0, 0.025, 0.05, 0.1)
BLOCK = 64
NOTES = (
    "A margin of 0.05 adds 0.03 to known names from one style and 0.03 to 0.04 from four, and after "
    "pseudo-labels 0.01 to those of pictures seen unlabelled and 0.03 to those never seen; 0.01 to 0.02 "
    "to names of unseen concepts, and up to 0.01 to keywords. From 0.025 to 0.1 it matters little "
    "which. With it the plain view reaches nearly what only the mean of four views did.",
    "Margins were compared on the tracks that are reported. Where heads had been trained without one, "
    "pictures shown with it gained as much: what counts is that a picture is as large as its augmented "
    "views are on average, and not that some background is there. Pictures and views that all have one "
    "gained less. By hand, one seed of the recipe, no script kept.",
)


def plain_features(store: Store, pairs: PairSet, margin: float, threads: int) -> np.ndarray[Any, Any]:
    """Return features float16 [1, N, F] of the plain view with a margin."""
    shown = dataclasses.replace(pairs, summary={**pairs.summary, "margin": margin})
    folder = newest(store, "backbones").path
    (backbone,) = read_backbones(folder)
    found = np.empty((1, len(pairs), backbone.features), np.float16)
    with OnnxRuntimeEngine(folder / backbone.file, threads=threads) as engine:
        for start in range(0, len(pairs), BLOCK):
            places = np.arange(start, min(start + BLOCK, len(pairs)))
            pixels = shown.shown(places, backbone.resolution)
            found[0, places] = engine.infer({"pixels": pixels})["features"]
    return found


def with_margin(store: Store, pairs: PairSet, features: Tensor, margin: float, given: Any) -> Tensor:
    """Return projected features [V, N, WIDTH] whose first view has a margin."""
    kept = given.scratch / f"adapt-margin-{margin}.pt"
    if not kept.exists():
        own = np.load(newest(store, "features").path / "features.npy", mmap_mode="r")
        torch.save(adapt.projected_as(own, plain_features(store, pairs, margin, given.threads)), kept)
    return torch.cat([torch.load(kept), features[1:]])


def compared(store: Store, found: dict[str, Any], options: argparse.Namespace) -> Iterator[None]:
    """Run what is missing of the comparison."""
    batches.MAX_CONCEPTS = adapt.OTHER_CONCEPTS
    pairs, features, text = adapt.prepared(store, options.scratch)
    share = Share(options.share)
    for seed in range(options.seeds):
        for margin in MARGINS:
            views = with_margin(store, pairs, features, margin, options)
            for setting, styles in adapt.SETTINGS.items():
                done = found["runs"].setdefault(setting, {}).setdefault(str(margin), {})
                if len(done.get(str(seed), {})) == len(TITLES) or not share.takes():
                    continue
                ours = adapt.restricted(pairs, styles)
                for stage, rounds in zip(TITLES, (0, adapt.ROUNDS), strict=True):
                    started = time.process_time()
                    made = member(ours, views, text, seed, epochs=CONFIG.epochs, rounds=rounds)
                    cpu_s = round(time.process_time() - started, 1)
                    reached = {"map10": adapt.measured(made, ours, text), "cpu_s": cpu_s}
                    done.setdefault(str(seed), {})[stage] = reached
                yield


def page(found: dict[str, Any]) -> str:
    """Return the whole page."""
    made = found["made"]
    lines = [
        "# A margin around what a model is shown",
        "",
        "`data.margin`: the plain view of a picture, which is what a device shows its model, leaves this "
        "share of the side as background on each of the four sides. The augmented views, which show 0.85 to "
        "1.3 times the square, are the same in all rows. mAP@10, target twemoji (gallery of 1,652; unseen "
        "concepts: gallery of 165), mean over seeds with the 95 % interval of Student's t; in brackets, each "
        f"picture by the mean of its plain view and three augmented copies. {ONE_RELEVANT_NOTE}",
        "",
        "Heads on features projected to 512 dimensions, text tower frozen, as in adapt.md, trained for "
        f"{CONFIG.epochs} epochs: figures compare the margins and lie below those of a recipe. Made by "
        f"`{made['command']}` at commit {made['commit']} on {made['machine']}.",
    ]
    for setting in adapt.SETTINGS:
        rows = found["runs"].get(setting, {})
        lines += [
            "",
            f"## {setting} -> twemoji",
            "",
            "| margin | seeds | transductive | inductive | unseen | keywords: trans. | ind. | unseen "
            "| CPU s |",
            "| --- | ---: | --- | --- | --- | --- | --- | --- | ---: |",
        ]
        lines += [row(str(m), stage, rows[str(m)]) for stage in TITLES for m in MARGINS if rows.get(str(m))]
    return "\n".join([*lines, "", *(f"{note}\n" for note in NOTES)])


def main() -> None:
    """Run what is missing, then write the table."""
    parser = bench_parser(__doc__)
    add_seeds(parser)
    parser.add_argument("--threads", type=int, default=1)
    add_share(parser, OUT)
    options = parser.parse_args()
    path = options.output / "adapt_margin.json"
    found = kept_figures(path, options.merge) or {"made": {}, "runs": {}}
    if not options.table:
        found["made"] = {"command": "scripts/bench/adapt_margin.py", **origin()}
        store = Store(Path(os.environ["EDGEGLM_STORE"]))
        for _ in compared(store, found, options):
            path.write_text(json.dumps(found, indent=1) + "\n")
    path.write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "adapt_margin.md").write_text(page(found))


if __name__ == "__main__":
    main()
