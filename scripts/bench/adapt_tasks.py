"""What a teacher gains from other tasks, from a first state, and from reading first, on cached features.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/adapt_tasks.py [--seeds 3] [--only reading|tasks]

STORE is one in which the recipe `default` was built. The setting is adapt.py's: projected features, small
heads, a frozen text tower, equal steps in all rows. Categories are Unicode's groups and subgroups. A tower
that reads goes once, for each way and seed, over CLDR's names and keywords without the documents of unseen
concepts; both settings then use it. Products in bfloat16 are a row only where the processor has them. Writes
docs/bench/adapt_tasks.json after each run, goes on from it when called again, and writes adapt_tasks.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import adapt  # noqa: E402
from bench_store import CachedText, Share, add_seeds, add_share, bench_parser, interval, kept_figures, origin  # noqa: E402

from edgeglm.adapt import batches  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.cleaning import by_patterns, cleaned  # noqa: E402
from edgeglm.adapt.corpora import (  # noqa: E402
    CLDR_ASSET,
    documents_from_cldr,
    evaluated_texts,
    glossary_from_pairs,
    without_unseen,
)
from edgeglm.adapt.meta import tasks_of  # noqa: E402
from edgeglm.adapt.multitask import kinds_of  # noqa: E402
from edgeglm.adapt.pretraining import pretrained  # noqa: E402
from edgeglm.adapt.sources import source_spec  # noqa: E402
from edgeglm.adapt.text_teacher import load_text_teacher  # noqa: E402
from edgeglm.assets import asset_member, asset_named, fetch_asset  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import TeacherConfig  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.core.teacher_config import (  # noqa: E402
    MultitaskConfig,
    OptimisationConfig,
    PretrainingConfig,
)
from edgeglm.data.categories import CATEGORIES_ASSET, kind_of, kinds_from_emoji_json  # noqa: E402
from edgeglm.data.iconsets import plain_code  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402
from edgeglm.train.precision import computes_bfloat16  # noqa: E402

OUT = ROOT / "docs" / "bench"
BOTH: dict[str, Any] = {"category_weight": 0.3, "subcategory_weight": 0.3}
NOTHING = "retrieval alone"
#: Name of a row, what is on in it, and its source.
TASKS: dict[str, tuple[dict[str, Any], str]] = {
    NOTHING: ({}, "-"),
    "category, hard sharing": ({"category_weight": 0.3}, "Caruana, 1997"),
    "both, hard sharing": (BOTH, "Caruana, 1997"),
    "both, soft sharing": ({**BOTH, "sharing": "soft"}, "Duong et al., 2015"),
    "both, uncertainty weighting": ({**BOTH, "balance": "uncertainty"}, "Kendall et al., 2018"),
    "both, GradNorm": ({**BOTH, "balance": "gradnorm"}, "Chen et al., 2018"),
    "both, PCGrad": ({**BOTH, "balance": "pcgrad"}, "Yu et al., 2020"),
    "Reptile over styles": ({"reptile_rounds": 40, "reptile_over": "styles"}, "Nichol et al., 2018"),
    "Reptile over categories": ({"reptile_rounds": 40, "reptile_over": "categories"}, "Nichol et al., 2018"),
    "200 further steps, for Reptile": ({}, "-"),
    "products in bfloat16": ({}, "Micikevicius et al., 2018; Kalamkar et al., 2019"),
}
CONTROL, MIXED = "200 further steps, for Reptile", "products in bfloat16"
READ: dict[str, Any] = {"epochs": 1, "batch_size": 32, "max_length": 32, "learning_rate": 5e-5}
READING: dict[str, tuple[dict[str, Any], str]] = {
    "masked words": ({}, "BERT, 2019"),
    "masked words, order": ({"order_weight": 0.5}, "ALBERT, 2020"),
    "masked words, terms": ({"term_weight": 0.5}, "ERNIE, 2019"),
    "all three": ({"order_weight": 0.5, "term_weight": 0.5}, "as above"),
    "all three, anchored": (
        {"order_weight": 0.5, "term_weight": 0.5, "anchor_weight": 10.0},
        "Li & Hoiem, 2016",
    ),
}
TRACKS = adapt.TRACKS


def with_kinds(pairs: PairSet, store: Store) -> PairSet:
    """Return the pairs with Unicode's group and subgroup of each concept."""
    said = {name: fetch_asset(name, store, QuietProgress()) for name in ("noto", CATEGORIES_ASSET)}
    listed = kinds_from_emoji_json(
        asset_member(said[CATEGORIES_ASSET], asset_named(CATEGORIES_ASSET).members["emoji"])
    )
    codes: dict[str, set[str]] = {}
    for code, name in json.loads(asset_member(said["noto"], asset_named("noto").members["chars"])).items():
        codes.setdefault(name, set()).add(plain_code(code))
    rows = []
    for row in pairs.rows:
        category, subcategory = kind_of(codes.get(row.concept, ()), listed)
        rows.append(msgspec.structs.replace(row, category=category, subcategory=subcategory))
    return dataclasses.replace(pairs, rows=tuple(rows))


def run(
    pairs: PairSet,
    features: Any,
    text: Any,
    wanted: MultitaskConfig,
    seed: int,
    *,
    more: int = 0,
    mixed: bool = False,
) -> Any:
    """Train heads, and return what they reach and what they cost."""
    stepping = OptimisationConfig(precision="bfloat16" if mixed else "float32")
    concepts = Concepts.of(pairs)
    started = time.process_time()
    with seeded(seed, threads=1):
        made = Alignment(
            features,
            concepts,
            text,
            msgspec.structs.replace(adapt.CONFIG, multitask=wanted, optimisation=stepping),
            seed=seed,
            progress=QuietProgress(),
            kinds=kinds_of(wanted, pairs, concepts),
            meta_tasks=tasks_of(pairs, concepts, wanted.reptile_over) if wanted.reptile_rounds else (),
        )
        if more:
            made._fit_heads("warm-up", 1, least=more)
        made.run()
        found: dict[str, Any] = {"map10": adapt.measured(made, pairs, text)}
        found["cpu_s"] = adapt._since(started)
        if made.multitask is not None:
            for name in ("catalogue-inductive", "unseen"):
                chosen = sorted({i for query in pairs.track(name).queries for i in query.relevant})
                found[name] = made.multitask.scores(features[0], pairs, chosen)
    return found


def tasks_runs(found: dict[str, Any], path: Path, seeds: int, data: Any, store: Store, share: Share) -> None:
    """Run what is missing of the tasks."""
    pairs, features, text = data
    pairs = with_kinds(pairs, store)
    for seed in range(seeds):
        for setting, styles in adapt.SETTINGS.items():
            for name, (options, _) in TASKS.items():
                done = found["runs"].setdefault(setting, {}).setdefault(name, {})
                if str(seed) in done or (name == "Reptile over styles" and len(styles) < 2):
                    continue
                if (name == MIXED and not computes_bfloat16("cpu")) or not share.takes():
                    continue
                wanted = MultitaskConfig(**options)
                ours = adapt.restricted(pairs, styles)
                more = 200 if name == CONTROL else 0
                done[str(seed)] = run(ours, features, text, wanted, seed, more=more, mixed=name == MIXED)
                keep(found, path, f"{setting}, {name}, seed {seed}", done[str(seed)])


def reading_runs(
    found: dict[str, Any], path: Path, seeds: int, data: Any, store: Store, share: Share
) -> None:
    """Run what is missing of the readings: each tower reads once, both settings use it."""
    pairs, features, text = data
    counts: Counter[str] = Counter()
    cldr = asset_member(
        fetch_asset(CLDR_ASSET, store, QuietProgress()), asset_named(CLDR_ASSET).members["en"]
    )
    kept = without_unseen(documents_from_cldr(cldr), pairs, counts)
    documents = list(cleaned(kept, by_patterns, counts, forbidden=evaluated_texts(pairs)))
    found["corpus"] = {"documents": len(documents), "left_out": dict(sorted(counts.items()))}
    source = fetch_asset(source_spec(TeacherConfig().text), store, QuietProgress())
    for seed in range(seeds):
        for name, (options, _) in READING.items():
            waiting = [
                setting
                for setting in adapt.SETTINGS
                if str(seed) not in found["runs"].setdefault(setting, {}).setdefault(name, {})
            ]
            if not waiting or not share.takes():
                continue
            started = time.process_time()
            with store.scratch() as folder, seeded(seed, threads=1):
                tower = load_text_teacher(TeacherConfig().text, source, folder / "text", max_length=32)
                config = PretrainingConfig(**READ, **options)
                told = pretrained(
                    tower, documents, glossary_from_pairs(pairs), config, seed=seed, progress=QuietProgress()
                )
                cost = adapt._since(started)
                texts = list(text.place)
                read = CachedText(texts, tower.all_features(texts))
            for setting in waiting:
                ours = adapt.restricted(pairs, adapt.SETTINGS[setting])
                done = run(ours, features, read, MultitaskConfig(), seed)
                done |= {"read_cpu_s": cost, "before": told["before"], "after": told["after"]}
                found["runs"][setting][name][str(seed)] = done
                keep(found, path, f"{setting}, {name}, seed {seed}", done)


def keep(found: dict[str, Any], path: Path, title: str, done: Any) -> None:
    """Write what there is."""
    path.write_text(json.dumps(found, indent=1) + "\n")
    sys.stderr.write(f"{title}: {done}\n")


def cells(runs: list[Any]) -> list[str]:
    """Return the retrieval columns of a row."""
    scores = [interval([run["map10"][track][0] for run in runs]) for track in TRACKS]
    words = " / ".join(
        f"{statistics.mean(run['map10'][f'{track}-keywords'][0] for run in runs):.3f}" for track in TRACKS
    )
    return [*scores, interval([run["map10"][TRACKS[0]][1] for run in runs]), words]


def classified(runs: list[Any], track: str) -> str:
    """Return accuracy and macro-F1 of both tasks on a track's images."""
    parts = []
    for task in ("category", "subcategory"):
        told = [run[track][task] for run in runs if task in run.get(track, {})]
        if told:
            accuracy = statistics.mean(one["accuracy"] for one in told)
            parts.append(f"{accuracy:.2f} ({statistics.mean(one['macro_f1'] for one in told):.2f})")
    return " / ".join(parts) or "-"


def page(found: dict[str, Any]) -> str:
    """Return the whole page."""
    lines = [
        "# Other tasks, a first state, and reading first",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}.",
        "",
        "The setting of [adapt.md](adapt.md): mAP@10, target twemoji, heads on projected cached features, "
        "text tower frozen while they train, mean over seeds with the 95 % interval of Student's t. Figures "
        f"compare the ways, and lie below those of the recipe. {ONE_RELEVANT_NOTE}",
        "",
    ]
    head = "| way | source | seeds | transductive | inductive | unseen | transductive, mean view | keywords "
    head += "(trans. / ind. / unseen) |"
    for setting in adapt.SETTINGS:
        rows = found["runs"].get(setting, {})
        if not any(rows.values()):
            continue
        lines += [
            f"## {setting} -> twemoji: tasks and first states",
            "",
            f"{head} accuracy (macro-F1), inductive | unseen | CPU s |",
            "| --- | --- | ---: | --- | --- | --- | --- | --- | --- | --- | ---: |",
        ]
        for name, (_, source) in TASKS.items():
            runs = list(rows.get(name, {}).values())
            if runs:
                kinds = [classified(runs, track) for track in ("catalogue-inductive", "unseen")]
                cpu = f"{statistics.mean(run['cpu_s'] for run in runs):.0f}"
                lines.append(f"| {' | '.join([name, source, str(len(runs)), *cells(runs), *kinds, cpu])} |")
        lines.append("")
        if not any(rows.get(name) for name in READING):
            continue
        lines += [f"## {setting} -> twemoji: reading first", ""]
        lines += [
            f"{head} not read: words told right before / after | order told right | terms | CPU s |",
            "| --- | --- | ---: | --- | --- | --- | --- | --- | --- | --- | --- | ---: |",
        ]
        for name, source in [(NOTHING, "-"), *((n, s) for n, (_, s) in READING.items())]:
            runs = list(rows.get(name, {}).values())
            if not runs:
                continue
            told = ["-", "-", "-"]
            if "after" in runs[0]:
                told = [reading(runs, "mlm", both=True), reading(runs, "order"), reading(runs, "term")]
            cpu = f"{statistics.mean(run['cpu_s'] + run.get('read_cpu_s', 0.0) for run in runs):.0f}"
            lines.append(f"| {' | '.join([name, source, str(len(runs)), *cells(runs), *told, cpu])} |")
        lines.append("")
    rows = len(TASKS) - (not computes_bfloat16("cpu")) + len(READING)
    wanted = (len(adapt.SETTINGS) * rows - 1) * found["seeds"]  # one source has no styles to go over
    made = sum(len(seeds) for rows in found["runs"].values() for seeds in rows.values())
    if made < wanted:
        lines += [
            f"{made} of {wanted} runs are made so far, so nothing is told apart yet; the same command makes "
            "the rest.",
            "",
        ]
    if "corpus" in found:
        left = ", ".join(f"{count:,} {why}" for why, count in found["corpus"]["left_out"].items())
        lines += [
            f"The corpus: {found['corpus']['documents']:,} documents of CLDR's English annotations, a name "
            f"and a list of keywords each; left out or replaced: {left}. It says which keywords belong to "
            "which known name, so the keyword columns of the towers that read it are no longer a test of "
            "what was not trained on; names of unseen concepts are.",
            "",
        ]
    return "\n".join([*lines, *found.get("notes", [])])


def reading(runs: list[Any], objective: str, *, both: bool = False) -> str:
    """Return the share told right on rows that were not read."""
    trained = [run for run in runs if objective in run["after"]]
    if not trained:
        return "-"
    after = statistics.mean(run["after"][objective]["accuracy"] for run in trained)
    before = statistics.mean(run["before"][objective]["accuracy"] for run in trained)
    return f"{before:.2f} / {after:.2f}" if both else f"{after:.2f}"


def main() -> None:
    """Run what is missing, then write the page."""
    parser = bench_parser(__doc__)
    add_seeds(parser)
    parser.add_argument("--only", choices=["tasks", "reading"])
    add_share(parser, OUT)
    options = parser.parse_args()
    path = options.output / "adapt_tasks.json"
    found = kept_figures(path, options.merge)
    found.setdefault("runs", {})
    share = Share(options.share)
    if not options.table:
        found |= {"command": f"scripts/bench/adapt_tasks.py --seeds {options.seeds}", **origin()}
        found["seeds"] = options.seeds
        batches.MAX_CONCEPTS = adapt.OTHER_CONCEPTS
        store = Store(Path(os.environ["EDGEGLM_STORE"]))
        data = adapt.prepared(store, options.scratch)
        if options.only != "reading":
            tasks_runs(found, path, options.seeds, data, store, share)
        if options.only != "tasks":
            reading_runs(found, path, options.seeds, data, store, share)
    found.setdefault("seeds", options.seeds)
    if options.merge:
        path.write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "adapt_tasks.md").write_text(page(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
