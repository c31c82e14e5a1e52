"""Ways to bring unlabelled target images into a teacher, compared on cached features.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/adapt.py [--seeds 3] [--recipe]

STORE is one in which the recipe `default` was built: its pairs, its features and its text model are used.
To compare many ways on little hardware, features are projected to 512 dimensions by one random matrix, heads
are small, the text tower is frozen and a step contrasts the batch's concepts with 512 others; every
row has the same steps. What is compared is the ways, not the recipe. Two settings: labels of
one style (the other three styles are not used in any form) and of four. With --recipe the teacher of the
recipe itself is trained instead, on full features and with LoRA, and measured before and after pseudo-labels.
Writes docs/bench/adapt.json (or adapt-recipe.json) after each run, goes on from it when called again, and
writes adapt.md from both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from bench_store import CachedText, add_seeds, bench_parser, interval, newest, origin  # noqa: E402

from edgeglm.adapt import alignment, batches  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.domains import Domains  # noqa: E402
from edgeglm.adapt.sources import source_spec  # noqa: E402
from edgeglm.adapt.text_teacher import load_text_teacher  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import DomainConfig, TeacherConfig  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE, evaluate_tracks  # noqa: E402
from edgeglm.models.projection import normalized  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402

OUT = ROOT / "docs" / "bench"
WIDTH, OTHER_CONCEPTS = 512, 512
SETTINGS = {"noto": ("noto",), "four styles": ("noto", "openmoji", "fluent-emoji-flat", "emojione")}
CONFIG = TeacherConfig(
    embedding_dim=128, hidden=256, batch_size=256, lora_epochs=0, epochs=10, learning_rate=2e-3
)
#: Name of a row, what is on in it, and its source. Each is measured again after two rounds of pseudo-labels.
ROWS: dict[str, tuple[DomainConfig, str]] = {
    "no unlabelled images": (DomainConfig(), "-"),
    "MMD, five kernels": (DomainConfig(mmd_weight=1.0), "Long et al., DAN, 2015"),
    "CORAL": (DomainConfig(coral_weight=1.0), "Sun & Saenko, Deep CORAL, 2016"),
    "DANN": (DomainConfig(dann_weight=0.3), "Ganin & Lempitsky, 2015"),
    "MMD, weight 10": (DomainConfig(mmd_weight=10.0), "Long et al., DAN, 2015"),
    "DANN, weight 3": (DomainConfig(dann_weight=3.0), "Ganin & Lempitsky, 2015"),
    "consistency with the mean view": (DomainConfig(consistency_weight=3.0), "Tarvainen & Valpola, 2017"),
    "curriculum of statistics": (DomainConfig(curriculum=1.0), "MixStyle, 2021; AdaBN, 2016"),
}
#: As many further steps as two rounds of pseudo-labels take, with labelled images alone.
CONTROL = "no unlabelled images, as many further steps"
ROUNDS = 2
NOTES = (
    "What pseudo-labels add is the difference to the row of as many further steps, not to the first row: "
    "two rounds take as many steps again, and these small heads were not trained out. They add 0.11 (one "
    "style) and 0.07 (four styles) on the half of the target that was there unlabelled, and cost 0.03 and "
    "0.01 on names whose picture never was.",
    "MMD, CORAL, DANN and the curriculum stay within the intervals of doing nothing; DANN at ten times the "
    "weight is worse than nothing from one style, and consistency of views lowers names of known concepts. "
    "The mean over four views, which takes no training, adds more than any of these terms.",
    "By each way alone names of unseen concepts fall short of the 0.45 that was aimed at: 0.31 by the "
    "recipe, 0.33 after pseudo-labels, 0.37 by the mean over views on top of that (below), 0.36 where the "
    "last blocks were tuned on pictures as well (adapt_images.md, one seed), 0.33 with DINOv2's ViT-S "
    "beside Lite0 (build_ensemble.md), 0.38 where named icons of other domains were learned too "
    "(adapt_auxiliary.md); asking a classifier what a picture shows adds 0.03, to 0.40 beside those icons "
    "(adapt_conse.md), and three pairs of heads and a margin on top of both 0.06, to 0.46 "
    "(adapt_heads.md). More labelled styles help most: 0.20 from one, 0.29 from four in the tables above. "
    "Other tasks, meta-learning and reading first (adapt_tasks.md) stay within the interval, and so does "
    "each way of tuning the text tower (adapt_tuning.md).",
)
TRACKS = ("catalogue-transductive", "catalogue-inductive", "unseen")


def prepared(store: Store, scratch: Path) -> tuple[PairSet, torch.Tensor, CachedText]:
    """Return the pairs, the projected features float16 [V, N, WIDTH] and the text features."""
    from edgeglm.assets import fetch_asset

    pairs = PairSet.open(newest(store, "pairs"))
    cached = scratch / "adapt-bench.pt"
    if not cached.exists():
        features = np.load(newest(store, "features").path / "features.npy", mmap_mode="r")
        projected = projected_as(features, features)
        texts = sorted(
            {text for row in pairs.rows for text in row.captions}
            | {query.text for track in pairs.tracks for query in track.queries}
        )
        source = fetch_asset(source_spec(TeacherConfig().text), store, QuietProgress())
        with store.scratch() as folder:
            tower = load_text_teacher(TeacherConfig().text, source, folder / "text", max_length=32)
            torch.save((projected, texts, tower.all_features(texts)), cached)
    projected, texts, features_TF = torch.load(cached)
    return pairs, projected, CachedText(texts, features_TF)


def projected_as(
    own: np.ndarray[Any, np.dtype[Any]], features: np.ndarray[Any, np.dtype[Any]]
) -> torch.Tensor:
    """Return features [V, N, WIDTH]: standardised as ``own`` would be, then projected by one matrix."""
    generator = torch.Generator().manual_seed(0)
    random_FW = torch.randn(own.shape[2], WIDTH, generator=generator) / own.shape[2] ** 0.5
    sample = own[0, ::3].astype(np.float32)
    mean, std = sample.mean(0), sample.std(0) + 1e-3
    projected = torch.empty(*features.shape[:2], WIDTH, dtype=torch.float16)
    for view in range(features.shape[0]):
        for start in range(0, features.shape[1], 512):
            rows = ((features[view, start : start + 512] - mean) / std).clip(-8, 8).astype(np.float32)
            projected[view, start : start + 512] = (torch.from_numpy(rows) @ random_FW).half()
    return projected


def restricted(pairs: PairSet, styles: tuple[str, ...]) -> PairSet:
    """Return the pairs with every image of another labelled style out of all training."""
    rows = (
        msgspec.structs.replace(row, role="held")
        if row.role == "labelled" and row.domain not in styles
        else row
        for row in pairs.rows
    )
    return dataclasses.replace(pairs, rows=tuple(rows))


def measured(made: Alignment, pairs: PairSet, text: Any) -> dict[str, list[float]]:
    """Return mAP@10 by track: of the plain view, and of the mean over the cached views."""
    made.image_head.eval()
    made.text_head.eval()
    views_VND = torch.from_numpy(made.image_embeddings())

    def embedded(texts: list[str]) -> Any:
        with torch.no_grad():
            return made.text_head(text.all_features(texts)).numpy()

    found: dict[str, list[float]] = {}
    for image_ND in (views_VND[0], normalized(views_VND.mean(0))):
        metrics = evaluate_tracks(pairs.tracks, embedded, image_ND.numpy(), bootstrap=0)
        for name, metric in metrics.items():
            found.setdefault(name, []).append(round(metric.map10.value, 4))
    return found


def run(
    pairs: PairSet,
    features: torch.Tensor,
    text: Any,
    config: TeacherConfig,
    seed: int,
    *,
    threads: int = 1,
    control: bool = False,
) -> dict[str, Any]:
    """Train a teacher, measure, go two rounds of pseudo-labels (or of labels alone) on, measure again."""
    concepts = Concepts.of(pairs)
    domains = Domains.of(pairs, concepts)
    started = time.process_time()
    with seeded(seed, threads=threads):
        made = Alignment(
            features, concepts, text, config, seed=seed, progress=QuietProgress(), domains=domains
        )
        made.run()
        found = {"heads": {"map10": measured(made, pairs, text), "cpu_s": _since(started)}}
        domain = msgspec.structs.replace(config.domain, pseudo_label_rounds=ROUNDS)
        made.config = msgspec.structs.replace(config, domain=domain)
        first = {} if control else first_round(made, pairs, concepts, domains)
        if control:
            extra = domains.unlabelled_M.shape[0] * 6 // 10 + len(concepts.image_N)
            steps = max(alignment.MIN_PSEUDO_STEPS, domain.pseudo_label_epochs * (extra // config.batch_size))
            for round_ in range(ROUNDS):
                made._fit_heads(f"control {round_ + 1:7}", 1, least=steps)
        else:
            made._fit_pseudo_labels(domains)
        after: dict[str, Any] = {"map10": measured(made, pairs, text), "cpu_s": _since(started)}
        found["pseudo-labelled"] = after | ({"first_round": first} if first else {})
    return found


def before_and_after(
    made: Alignment, pairs: PairSet, text: Any, domains: Domains, started: float
) -> dict[str, Any]:
    """Measure heads as they are, go two rounds of pseudo-labels on, and measure them again."""
    found = {"heads": {"map10": measured(made, pairs, text), "cpu_s": _since(started)}}
    domain = msgspec.structs.replace(made.config.domain, pseudo_label_rounds=ROUNDS)
    made.config = msgspec.structs.replace(made.config, domain=domain)
    made._fit_pseudo_labels(domains)
    found["pseudo-labelled"] = {"map10": measured(made, pairs, text), "cpu_s": _since(started)}
    return found


def _since(started: float) -> float:
    return round(time.process_time() - started, 1)


def first_round(made: Alignment, pairs: PairSet, concepts: Concepts, domains: Domains) -> dict[str, float]:
    """Return what share of the unlabelled images is paired at first, and how many of those rightly."""
    chosen_P, concept_P = made._matched(concepts, domains)
    names = sorted({row.concept for row in pairs.rows if row.role == "labelled"})
    true = [
        pairs.rows[i].concept == names[c]
        for i, c in zip(domains.unlabelled_M[chosen_P].tolist(), concept_P.tolist(), strict=True)
    ]
    return {
        "covered": round(len(true) / len(domains.unlabelled_M), 3),
        "right": round(float(np.mean(true)), 3),
    }


def recipe_runs(store: Store, path: Path, seeds: int, threads: int) -> None:
    """Train the teacher of the recipe in both settings and keep what it reaches in ``path``."""
    from edgeglm.assets import fetch_asset

    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    pairs = PairSet.open(newest(store, "pairs"))
    features = torch.from_numpy(np.load(newest(store, "features").path / "features.npy", mmap_mode="c"))
    source = fetch_asset(source_spec(TeacherConfig().text), store, QuietProgress())
    for seed in range(seeds):
        for setting, styles in SETTINGS.items():
            if str(seed) in found.setdefault(setting, {}):
                continue
            with store.scratch() as folder:
                text = load_text_teacher(TeacherConfig().text, source, folder / "text", max_length=32)
                ours = restricted(pairs, styles)
                found[setting][str(seed)] = run(ours, features, text, TeacherConfig(), seed, threads=threads)
            path.write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict[str, Any]) -> str:
    """Return the whole page."""
    lines = [
        "# Adapting a teacher to a style that has no labels",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}.",
        "",
        "mAP@10, target twemoji (gallery of 1,651; unseen concepts: gallery of 165), mean over "
        "seeds with the 95 % interval of Student's t. Heads on cached features that were "
        "projected to 512 dimensions, text tower frozen, equal steps in all rows of a block: figures compare "
        "the ways, and lie below those of the recipe. 'mean view' ranks by the mean embedding over the plain "
        f"picture and three augmented copies. {ONE_RELEVANT_NOTE}",
        "",
    ]
    for setting in SETTINGS:
        rows = found["runs"].get(setting, {})
        lines += [
            f"## {setting} -> twemoji",
            "",
            "| way | source | seeds | transductive | inductive | unseen | transductive, mean view | keywords "
            "(trans. / ind. / unseen) | CPU s |",
            "| --- | --- | ---: | --- | --- | --- | --- | --- | ---: |",
        ]
        for stage in ("heads", "pseudo-labelled"):
            for name, source in [*((n, s) for n, (_, s) in ROWS.items()), (CONTROL, "-")]:
                seeds = list(rows.get(name, {}).values())
                if not seeds or (name == CONTROL and stage == "heads"):
                    continue
                runs = [seed[stage] for seed in seeds]
                scores = {t: [r["map10"][t] for r in runs] for t in runs[0]["map10"]}
                title = name if stage == "heads" or name == CONTROL else f"{name} + pseudo-labels"
                words = " / ".join(
                    f"{statistics.mean(v[0] for v in scores[t + '-keywords']):.3f}" for t in TRACKS
                )
                cells = [interval([v[0] for v in scores[t]]) for t in TRACKS]
                cells.append(interval([v[1] for v in scores[TRACKS[0]]]))
                cpu = statistics.mean(r["cpu_s"] for r in runs)
                cited = source
                if stage != "heads" and name != CONTROL:
                    cited = "Lee, 2013" if source == "-" else f"{source}; Lee, 2013"
                lines.append(
                    f"| {title} | {cited} | {len(runs)} | {' | '.join(cells)} | {words} | {cpu:.0f} |"
                )
        first = [seed["pseudo-labelled"]["first_round"] for seed in rows.get(next(iter(ROWS)), {}).values()]
        if first:
            covered = statistics.mean(f["covered"] for f in first)
            right = statistics.mean(f["right"] for f in first)
            lines += [
                "",
                f"Without other terms, the first round of mutual nearest neighbours pairs {covered:.0%} of "
                f"the unlabelled images, {right:.0%} of them rightly (by names that training never sees).",
            ]
        lines.append("")
    return "\n".join([*lines, *(f"{note}\n" for note in NOTES), *recipe_table()])


def recipe_table() -> list[str]:
    """Return the part about the recipe's own teacher, if it was run."""
    path = OUT / "adapt-recipe.json"
    if not path.exists():
        return []
    lines = [
        "## The recipe's own teacher",
        "",
        "Recipe `default` with `teacher.domain.pseudo_label_rounds=2`: full features, heads, LoRA, heads, "
        "then two rounds of pseudo-labels. mAP@10 of the plain view, of the mean over views in brackets. "
        "The rounds are further steps too; no control was run here.",
        "",
        "| labels | seeds | pseudo-labels | transductive | inductive | unseen | keywords: trans. | ind. "
        "| unseen |",
        "| --- | ---: | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setting, seeds in json.loads(path.read_text()).items():
        for stage in ("heads", "pseudo-labelled"):
            runs = [seed[stage]["map10"] for seed in seeds.values()]
            names = [*TRACKS, *(f"{track}-keywords" for track in TRACKS)]
            cells = [
                f"{interval([r[n][0] for r in runs])} ({statistics.mean(r[n][1] for r in runs):.3f})"
                for n in names
            ]
            first = next(iter(seeds.values()))["pseudo-labelled"].get("first_round", {})
            said = "no" if stage == "heads" else f"yes; {first['right']:.0%} of the first round right"
            lines.append(f"| {setting} | {len(runs)} | {said} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Run what is missing, then write the table."""
    parser = bench_parser(__doc__)
    add_seeds(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", action="store_true", help="train the recipe's own teacher")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "adapt.json"
    if options.recipe:
        store = Store(Path(os.environ["EDGEGLM_STORE"]))
        recipe_runs(store, OUT / "adapt-recipe.json", options.seeds, options.threads)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    if not (options.table or options.recipe):
        found |= {"command": "scripts/bench/adapt.py", **origin(), "seeds": options.seeds}
        grid_runs(found, path, options.seeds, options.scratch)
    (OUT / "adapt.md").write_text(table(found))


def grid_runs(found: dict[str, Any], path: Path, seeds: int, scratch: Path) -> None:
    """Run what is missing of the comparison and keep each run in ``path``."""
    batches.MAX_CONCEPTS = OTHER_CONCEPTS
    pairs, features, text = prepared(Store(Path(os.environ["EDGEGLM_STORE"])), scratch)
    for seed in range(seeds):
        for setting, styles in SETTINGS.items():
            for name in (*ROWS, CONTROL):
                done = found["runs"].setdefault(setting, {}).setdefault(name, {})
                if str(seed) in done:
                    continue
                domain = ROWS[name][0] if name in ROWS else DomainConfig()
                config = msgspec.structs.replace(CONFIG, domain=domain)
                ours = restricted(pairs, styles)
                done[str(seed)] = run(ours, features, text, config, seed, control=name == CONTROL)
                path.write_text(json.dumps(found, indent=1) + "\n")
                sys.stderr.write(f"{setting}, {name}, seed {seed}: {done[str(seed)]}\n")


if __name__ == "__main__":
    main()
