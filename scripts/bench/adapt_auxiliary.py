"""Teachers that learn named icons of other domains too, beside teachers that do not.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/adapt_auxiliary.py [--seeds 3] [--recipe]

STORE is one in which the recipe `default` was built. The icons of the recipe `auxiliary` are fetched and
rendered, and their features computed, if they are not there. Ways are compared as `adapt.py` does,
on projected features with a frozen text tower; the control takes as many steps with labelled
pictures alone as the icons add. With --recipe the recipe's own teacher is trained instead, on full features
and with LoRA. Writes docs/bench/adapt_auxiliary.json after each run, goes on from it when called again, and
writes adapt_auxiliary.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import adapt  # noqa: E402
from bench_store import (  # noqa: E402
    CachedText,
    Share,
    add_seeds,
    add_share,
    bench_parser,
    interval,
    kept_figures,
    newest,
    origin,
)

from edgeglm.adapt import alignment, batches  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.auxiliary import auxiliary_beside  # noqa: E402
from edgeglm.adapt.domains import Domains  # noqa: E402
from edgeglm.adapt.features_stage import AuxiliaryFeaturesStage, FeaturesConfig  # noqa: E402
from edgeglm.adapt.sources import source_spec  # noqa: E402
from edgeglm.adapt.text_teacher import load_text_teacher  # noqa: E402
from edgeglm.assets import fetch_asset  # noqa: E402
from edgeglm.build.shipped import load_recipe  # noqa: E402
from edgeglm.core.digest import sha256_json  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import AuxiliaryConfig, TeacherConfig  # noqa: E402
from edgeglm.core.stage import Context  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.auxiliary import AuxiliaryPairsConfig, AuxiliaryPairsStage  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.data.sources import auxiliary_inputs  # noqa: E402
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded, steps_in  # noqa: E402

OUT = ROOT / "docs" / "bench"
ICONS = load_recipe("auxiliary").teacher.auxiliary.icons
ROUNDS = adapt.ROUNDS
CONTROL = "no icons, as many further steps"
#: Name of a way, and the share that is replayed; None for no icons at all.
WAYS: dict[str, float | None] = {
    "no icons": None,
    CONTROL: None,
    "icons first, then none": 0.0,
    "icons first, a quarter replayed": 0.25,
    "icons first, half replayed": 0.5,
}
#: Ways at full size; the recipe without icons and without further steps stands in adapt.md.
TEACHERS = ("icons first, a quarter replayed", CONTROL, "icons first, then none")
NOTES = (
    "By equal steps icons bring small heads 0.03 to 0.06 of unseen names, and cost them 0.04 to 0.10 "
    "of known ones. The recipe's heads are twice as wide on thirteen times the features. With one "
    "seed each, beside as many further steps and after pseudo-labels, unseen names gain 0.09 from one "
    "style and 0.03 from four; known ones gain nothing from one style and lose 0.04 (seen unlabelled) "
    "and 0.01 (never seen) from four. The recipe `auxiliary` trains its heads for 60 epochs, and then "
    "has 0.847, 0.802 and, unseen, 0.373 (build_auxiliary.md).",
    "How far one seed goes: with 54 icons more, which say an unseen name in the plural or as two "
    "words and are left out since, the row with a quarter replayed was 0.847, 0.796 and 0.388 from "
    "four styles, and 0.671, 0.564 and 0.318 from one. The other rows still have those 6,935 icons.",
    "Further steps alone raise names of pictures that were never seen, too: after pseudo-labels they "
    "are 0.048 below those that were (four styles), where the recipe of adapt.md leaves 0.051.",
    "By hand, with no script kept: 8,000 coloured icons of user interfaces brought less than these, "
    "all 20,000 together as much; and where each step contrasts a random half of all names, most of "
    "them icons', known names were 0.831: one's own take part first now.",
    "By icons alone unseen names stay short of the 0.45 that was aimed at; with what a classifier calls "
    "a picture, three pairs of heads and a margin the teacher has 0.46 (adapt_heads.md).",
)
TITLES = {"heads": "", "pseudo-labelled": " + pseudo-labels"}


def icons_beside(store: Store, threads: int) -> tuple[PairSet, np.memmap[Any, Any]]:
    """Return the icons that may be trained on, and their features float16 [V, M, F]."""
    context = Context(store=store, progress=QuietProgress(), threads=threads)
    sets = auxiliary_inputs(ICONS, store, context.progress)
    stage = AuxiliaryPairsStage(AuxiliaryPairsConfig(icons=ICONS))
    made = stage({"pairs": newest(store, "pairs"), **sets}, context).artifact
    looked = AuxiliaryFeaturesStage(FeaturesConfig(views=TeacherConfig().views, seed=0))
    features = looked({"pairs": made, "backbones": newest(store, "backbones")}, context).artifact
    return PairSet.open(made), np.load(features.path / "features.npy", mmap_mode="c")


def projected(store: Store, icons: PairSet, more: np.ndarray[Any, Any], scratch: Path) -> tuple[Any, ...]:
    """Return what `adapt.py` prepares, and the features of the icons and of their names alike."""
    pairs, features, text = adapt.prepared(store, scratch)
    told = sha256_json([row.id for row in icons.rows])[:16]  # which icons may train has changed before
    kept = scratch / f"adapt-auxiliary-{told}.pt"
    if not kept.exists():
        source = fetch_asset(source_spec(TeacherConfig().text), store, QuietProgress())
        texts = sorted({row.text for row in icons.rows} - set(text.place))
        with store.scratch() as folder:
            tower = load_text_teacher(TeacherConfig().text, source, folder / "text", max_length=32)
            own = np.load(newest(store, "features").path / "features.npy", mmap_mode="r")
            torch.save((adapt.projected_as(own, more), texts, tower.all_features(texts)), kept)
    small, texts, features_TF = torch.load(kept)
    both = CachedText([*text.place, *texts], torch.cat([text.features_TF, features_TF]))
    return pairs, features, both, small


def run(
    pairs: PairSet,
    features: Tensor,
    text: Any,
    config: TeacherConfig,
    seed: int,
    *,
    icons: PairSet,
    more: Tensor,
    share: float | None,
    threads: int = 1,
    further: int = 0,
) -> dict[str, Any]:
    """Train a teacher and measure it before and after two rounds of pseudo-labels."""
    concepts, started = Concepts.of(pairs), time.process_time()
    domains = Domains.of(pairs, concepts)
    beside = None
    if share is not None:
        config = msgspec.structs.replace(config, auxiliary=AuxiliaryConfig(icons=ICONS, replay=share))
        beside = auxiliary_beside(concepts, len(pairs), icons, more, share=share)
    with seeded(seed, threads=threads):
        made = Alignment(
            features, concepts, text, config, seed=seed, progress=QuietProgress(), domains=domains,
            auxiliary=beside,
        )  # fmt: skip
        made.run()
        if further:
            made._fit_heads("further", 1, least=further)
        return adapt.before_and_after(made, pairs, text, domains, started)


def further_steps(pairs: PairSet, icons: PairSet, config: TeacherConfig) -> int:
    """Return how many steps the phase on all named pictures has."""
    count = len(Concepts.of(pairs).image_N) + len(icons)
    return max(alignment.MIN_STEPS, AuxiliaryConfig().epochs * steps_in(count, config.batch_size))


def compared(store: Store, found: dict[str, Any], options: argparse.Namespace) -> Iterator[None]:
    """Run what is missing of the comparison on projected features."""
    batches.MAX_CONCEPTS = adapt.OTHER_CONCEPTS
    icons, features_of_icons = icons_beside(store, options.threads)
    pairs, features, text, more = projected(store, icons, features_of_icons, options.scratch)
    found["icons"] = icons.summary
    share = Share(options.share)
    for seed in range(options.seeds):
        for setting, styles in adapt.SETTINGS.items():
            ours = adapt.restricted(pairs, styles)
            for name, replay in WAYS.items():
                done = found["runs"].setdefault(setting, {}).setdefault(name, {})
                if str(seed) in done or not share.takes():
                    continue
                done[str(seed)] = run(
                    ours, features, text, adapt.CONFIG, seed, icons=icons, more=more, share=replay,
                    further=further_steps(ours, icons, adapt.CONFIG) if name == CONTROL else 0,
                )  # fmt: skip
                yield


def recipes(store: Store, found: dict[str, Any], options: argparse.Namespace) -> Iterator[None]:
    """Train the teacher of the recipe with the icons and without."""
    icons, more = icons_beside(store, options.threads)
    found["icons"] = icons.summary
    pairs = PairSet.open(newest(store, "pairs"))
    features = torch.from_numpy(np.load(newest(store, "features").path / "features.npy", mmap_mode="c"))
    source = fetch_asset(source_spec(TeacherConfig().text), store, QuietProgress())
    share = Share(options.share)
    for seed in range(options.seeds):
        for name in TEACHERS:
            for setting, styles in adapt.SETTINGS.items():
                done = found["recipe"].setdefault(setting, {}).setdefault(name, {})
                if str(seed) in done or not share.takes():
                    continue
                config, ours = TeacherConfig(), adapt.restricted(pairs, styles)
                with store.scratch() as folder:
                    text = load_text_teacher(config.text, source, folder / "text", max_length=32)
                    done[str(seed)] = run(
                        ours, features, text, config, seed, icons=icons, more=torch.from_numpy(more),
                        share=WAYS[name], threads=options.threads,
                        further=further_steps(ours, icons, config) if name == CONTROL else 0,
                    )  # fmt: skip
                yield


def page(found: dict[str, Any]) -> str:
    """Return the whole page."""
    icons = found["icons"]
    left = icons["left_out"]
    lines = [
        "# A teacher that learns named icons of other domains first",
        "",
        f"{icons['images']:,} icons with {icons['concepts']:,} names from {', '.join(ICONS)}: no emoji, most "
        f"of one colour. {left['says an unseen name']} icons that say all words of the name of an unseen "
        f"concept were left out, and {left['is worded as a query']} that are called as a query is worded. "
        "mAP@10, target twemoji (gallery of 1,652; unseen concepts: gallery of 165), mean over seeds with "
        "the 95 % interval of Student's t; in brackets, each picture by the mean of its plain view and three "
        f"augmented copies. {ONE_RELEVANT_NOTE}",
    ]
    sections = {
        "runs": "Heads on features projected to 512 dimensions, text tower frozen, as in adapt.md: "
        "figures compare the ways and lie below those of the recipe.",
        "recipe": "The teacher of the recipe `default` on full features, with LoRA: `teacher.auxiliary` as "
        "in the recipe `auxiliary`, and without.",
    }
    for part, said in sections.items():
        if part not in found["made"]:
            continue
        made = found["made"][part]
        lines += ["", f"{said} Made by `{made['command']}` at commit {made['commit']} on {made['machine']}."]
        for setting in adapt.SETTINGS:
            rows = found[part].get(setting, {})
            if not rows:
                continue
            lines += [
                "",
                f"## {setting} -> twemoji" + (", the recipe's teacher" if part == "recipe" else ""),
                "",
                "| way | seeds | transductive | inductive | unseen | keywords: trans. | ind. | unseen "
                "| CPU s |",
                "| --- | ---: | --- | --- | --- | --- | --- | --- | ---: |",
            ]
            lines += [row(name, stage, rows[name]) for stage in TITLES for name in WAYS if rows.get(name)]
    return "\n".join([*lines, "", *(f"{note}\n" for note in NOTES)])


def row(name: str, stage: str, seeds: dict[str, Any]) -> str:
    """Return one line of a table: a way, before pseudo-labels or after them, over its seeds."""
    runs = [seed[stage] for seed in seeds.values()]
    cells = []
    for track in (*adapt.TRACKS, *(f"{track}-keywords" for track in adapt.TRACKS)):
        plain, mean = ([run["map10"][track][view] for run in runs] for view in (0, 1))
        cells.append(f"{interval(plain)} ({statistics.mean(mean):.3f})")
    cpu = statistics.mean(run["cpu_s"] for run in runs)
    return f"| {name}{TITLES[stage]} | {len(runs)} | {' | '.join(cells)} | {cpu:.0f} |"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = bench_parser(__doc__)
    add_seeds(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", action="store_true", help="train the recipe's own teacher")
    add_share(parser, OUT)
    options = parser.parse_args()
    path = options.output / "adapt_auxiliary.json"
    found = kept_figures(path, options.merge) or {"made": {}, "runs": {}, "recipe": {}}
    part = "recipe" if options.recipe else "runs"
    if not options.table:
        command = f"scripts/bench/adapt_auxiliary.py{' --recipe' if options.recipe else ''}"
        found["made"][part] = {"command": command, **origin()}
        store = Store(Path(os.environ["EDGEGLM_STORE"]))
        for _ in (recipes if options.recipe else compared)(store, found, options):
            path.write_text(json.dumps(found, indent=1) + "\n")
    path.write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "adapt_auxiliary.md").write_text(page(found))


if __name__ == "__main__":
    main()
