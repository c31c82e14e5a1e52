"""Ways to distil a teacher into a student, compared at equal steps on real data.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/distil.py [--seeds N] [--steps N] [--matched]

STORE is one in which the recipe `default` was built: its pairs, its teacher and its targets are used. Both
towers of the smallest student are trained together for the same steps on the same batches (a seed draws the
same images, views and texts in every row), from the same first state, with the recipe's rates; rows differ
in their terms alone. The schedule is short, so figures compare the ways and lie below those of the recipe.
Writes docs/bench/distil.json after each run, goes on from it when called again, and writes distil.md.
`--matched` runs the first three rows only: labels alone, ours, and CLIP-KD.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from bench_store import Share, add_share, bench_parser, interval, kept_figures, newest, origin  # noqa: E402

from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import StudentConfig  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.data.tokenization import teacher_tokenizer  # noqa: E402
from edgeglm.distill.image_student import front_activations, frozen_blocks, image_student  # noqa: E402
from edgeglm.distill.joint import CLIP_KD, RECIPE, Cached, Terms, fit_towers_together  # noqa: E402
from edgeglm.distill.stages import anchors, concept_means, student_inputs  # noqa: E402
from edgeglm.distill.text_student import text_student  # noqa: E402
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE, evaluate_tracks  # noqa: E402
from edgeglm.evaluate.towers import TextSettings, gallery_images, text_embeddings  # noqa: E402
from edgeglm.models.projection import normalized  # noqa: E402
from edgeglm.models.published import lite0_state  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402

OUT = ROOT / "docs" / "bench"
CONFIG = StudentConfig(size="edge-xs", views=2)
LABELS = Terms(labels=1.0)
#: Name of a row, its terms, its source.
ROWS: dict[str, tuple[Terms, str]] = {
    "no KD: labels alone": (LABELS, "CLIP, 2021"),
    "ours: feature + anchors + anchor labels": (RECIPE, "the recipe"),
    "CLIP-KD: labels + FD + ICL + CRD": (CLIP_KD, "Yang et al., 2024"),
    "labels + FD": (replace(LABELS, feature=4.0), "Yang et al., 2024"),
    "labels + CRD": (replace(LABELS, relational=1.0), "Yang et al., 2024"),
    "labels + ICL": (replace(LABELS, interactive=1.0), "Yang et al., 2024"),
    "labels + affinity mimicking": (replace(LABELS, affinity=1.0), "TinyCLIP, Wu et al., 2023"),
    "labels + logits KL": (replace(LABELS, logits=1.0), "Hinton et al., 2015"),
    "labels + gradients (GD)": (replace(LABELS, gradient=1.0), "Yang et al., 2024"),
    "FD alone": (Terms(feature=6.0), "Yang et al., 2024"),
    "CRD alone": (Terms(relational=1.0), "Yang et al., 2024"),
    "ICL alone": (Terms(interactive=1.0), "Yang et al., 2024"),
    "affinity mimicking alone": (Terms(affinity=1.0), "TinyCLIP, Wu et al., 2023"),
    "logits KL alone": (Terms(logits=1.0), "Hinton et al., 2015"),
    "gradients (GD) alone": (Terms(gradient=1.0), "Yang et al., 2024"),
    "ours + CRD + ICL": (replace(RECIPE, relational=1.0, interactive=1.0), "both"),
}

#: Labels alone, ours, and CLIP-KD: ours is held against the other two.
MATCHED = tuple(ROWS)[:3]


class Bench:
    """The data of a store, loaded once, for students of one configuration."""

    def __init__(self, store: Store, config: StudentConfig = CONFIG, *, trains: bool = True) -> None:
        """Read pairs, teacher and targets; embed the evaluation's queries by the teacher."""
        self.config = config
        self.pairs = PairSet.open(newest(store, "pairs"))
        teacher, targets = newest(store, "teacher"), newest(store, "targets")
        self.tokenizer, settings = teacher_tokenizer(teacher.path)
        self.max_length = min(config.max_length, settings.max_length)
        inherit = student_inputs(config, store, QuietProgress())["inherit"]
        self.inherit = lite0_state(inherit)
        self.words = torch.from_numpy(np.load(targets.path / "words.npy"))
        images_VND = torch.from_numpy(np.load(teacher.path / "image_embeddings.npy"))
        self.dim = images_VND.shape[2]
        if not trains:
            return
        text_TD = torch.from_numpy(np.load(targets.path / "text_embeddings.npy"))
        concepts = Concepts.of(self.pairs)
        concept_N = torch.full((len(self.pairs),), -1)
        concept_N[concepts.image_N] = concepts.concept_N
        used = torch.from_numpy(np.sort(self.pairs.by_role("labelled", "unlabelled")))
        tower = image_student(config, embedding_dim=self.dim, inherit=self.inherit)
        self.cached = Cached(
            front_VU=front_activations(
                tower,
                self.pairs,
                used,
                config.views + 1,
                frozen_blocks(tower, config),
                resolution=config.resolution,
                seed=0,
            ),
            target_VUD=normalized(images_VND.mean(0))[used].expand(config.views + 1, -1, -1),
            concept_U=concept_N[used],
            concepts=concepts,
            texts=json.loads((targets.path / "texts.json").read_text("utf-8")),
            text_TD=text_TD,
            name_KD=anchors(text_TD, concepts, config.anchors, seed=0),
            mean_KD=concept_means(images_VND[0], concepts),
        )
        self.queries = sorted({query.text for track in self.pairs.tracks for query in track.queries})
        self.teacher = self.evaluated(self._said(teacher, settings.max_length), images_VND[0].numpy())

    def _said(self, teacher: Any, max_length: int) -> Any:
        """Return the teacher's answers to the queries, kept from the first time on."""
        kept = Path(os.environ.get("TMPDIR", "/tmp")) / f"distil-queries-{teacher.digest[:16]}.npy"
        if kept.exists():
            return np.load(kept)
        said = TextSettings(tokenizer=self.tokenizer, max_length=max_length)
        rows = text_embeddings(teacher.path / "text.onnx", self.queries, said, threads=1)
        np.save(kept, rows)
        return rows

    def evaluated(self, queries_QD: Any, image_ND: Any) -> dict[str, float]:
        """Return mAP@10 by track."""
        place = {text: i for i, text in enumerate(self.queries)}
        metrics = evaluate_tracks(
            self.pairs.tracks, lambda texts: queries_QD[[place[t] for t in texts]], image_ND, bootstrap=0
        )
        return {name: round(metric.map10.value, 4) for name, metric in metrics.items()}

    def run(self, terms: Terms, seed: int, steps: int) -> dict[str, Any]:
        """Train one student and measure it."""
        config = msgspec.structs.replace(self.config, max_length=self.max_length)
        with seeded(seed, threads=1):
            image = image_student(config, embedding_dim=self.dim, inherit=self.inherit)
            text = self.started_text(config)
            started = time.process_time()
            curve = fit_towers_together(
                image, text, self.tokenizer, self.cached, terms, config,
                steps=steps, seed=seed, progress=QuietProgress(),
            )  # fmt: skip
            seconds = time.process_time() - started
            with torch.no_grad():
                ids, mask = self.tokenizer.encode(self.queries, max_length=self.max_length)
                queries = text(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
                rows = np.zeros((len(self.pairs), self.dim), np.float32)
                chosen = gallery_images(self.pairs.tracks)
                for start in range(0, len(chosen), 256):
                    part = chosen[start : start + 256]
                    pixels = self.pairs.shown(part, config.resolution)
                    rows[part] = image(torch.from_numpy(pixels)).numpy()
        found = {"map10": self.evaluated(queries, rows), "cpu_s": round(seconds, 1)}
        self.towers = {"image": image, "text": text}
        return found | {"loss": [round(value, 4) for value in curve]}

    def started_text(self, config: StudentConfig) -> Any:
        """Return a text tower before it learns."""
        return text_student(config, embedding_dim=self.dim, words_WD=self.words)


def table(found: dict[str, Any]) -> str:
    """Return the page."""
    tracks = list(found["teacher"])
    lines = [
        "# Ways to distil, at equal steps",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}.",
        "",
        f"mAP@10 of student `{CONFIG.size}` ({found['steps']} steps, a short schedule; the recipe takes "
        "several times as many and a larger student), mean over seeds and half the range. Both towers are "
        "trained together, on the same batches of 64 images, 96 captions and 96 phrases in every row: what "
        "differs is the loss. Unlabelled images take part in every term that needs no label. 'six' is the "
        "mean over the tracks, 'of teacher' its ratio to the teacher's. Weighted 10 instead of 1, gradients "
        "collapse the student (six 0.006): embeddings that are all alike have hardly a gradient, as those of "
        "a good teacher. A seed draws the same batches in every row, and all rows start from one state, "
        "labels alone too: published weights in the image tower, the teacher's answers to words in the text "
        f"tower. {ONE_RELEVANT_NOTE} {_commits(found)}",
        "",
        f"| loss | source | {' | '.join(tracks)} | six | of teacher | seeds | CPU s |",
        f"| --- | --- |{' --- |' * len(tracks)} --- | --- | ---: | ---: |",
    ]
    teacher = statistics.mean(found["teacher"].values())
    cells = " | ".join(f"{value:.3f}" for value in found["teacher"].values())
    lines.append(f"| the teacher itself | - | {cells} | {teacher:.3f} | 1 | - | - |")
    mean: dict[str, float] = {}
    for name, (_, source) in ROWS.items():
        seeds = list(found["runs"].get(name, {}).values())
        if not seeds:
            continue
        values = [_ranged([seed["map10"][track] for seed in seeds]) for track in tracks]
        six = [statistics.mean(seed["map10"].values()) for seed in seeds]
        mean[name] = statistics.mean(six)
        cpu = statistics.mean(seed["cpu_s"] for seed in seeds)
        lines.append(
            f"| {name} | {source} | {' | '.join(values)} | {_ranged(six)} | {mean[name] / teacher:.3f} | "
            f"{len(seeds)} | {cpu:.0f} |"
        )
    lines += matched(found)
    missing = [name for name in ROWS if not found["runs"].get(name)]
    if missing:
        lines += ["", f"Not run yet (the same command goes on): {'; '.join(missing)}."]
    if any(len(seeds) < 2 for seeds in found["runs"].values()):
        lines += ["", "Rows of one seed have no interval: differences of a point or two say nothing."]
    return "\n".join([*lines, ""])


def matched(found: dict[str, Any]) -> list[str]:
    """Return the controls at equal steps: what ours has over each, seed by seed on the same batches."""
    bare, ours, kd = MATCHED
    runs, tracks = found["runs"], ["six", *found["teacher"]]
    lines = []
    for name in (bare, kd):
        seeds = sorted(set(runs.get(ours, {})) & set(runs.get(name, {})))
        if seeds:
            cells = [
                interval(
                    [100 * (_of(runs[ours][seed], track) - _of(runs[name][seed], track)) for seed in seeds]
                )
                for track in tracks
            ]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(seeds)} |")
    if not lines:
        return []
    return [
        "",
        "## Ours against each control",
        "",
        "Points of mAP@10 that ours has over the control, paired by seed, with the 95 % interval over seeds "
        "(Student's t).",
        "",
        f"| control | {' | '.join(tracks)} | seeds |",
        f"| --- |{' ---: |' * len(tracks)} ---: |",
        *lines,
    ]


def _of(run: dict[str, Any], track: str) -> float:
    return statistics.mean(run["map10"].values()) if track == "six" else float(run["map10"][track])


def _commits(found: dict[str, Any]) -> str:
    """Say at which commits the runs were made, where they say it."""
    runs = [run for seeds in found["runs"].values() for run in seeds.values()]
    made = sorted({run["commit"] for run in runs if "commit" in run})
    return f"Commits of the runs: {', '.join(made)}." if made else ""


def _ranged(values: list[float]) -> str:
    middle, half = statistics.mean(values), (max(values) - min(values)) / 2
    return f"{middle:.3f} ± {half:.3f}" if len(values) > 1 else f"{middle:.3f}"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = bench_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--matched", action="store_true", help="only labels alone, ours and CLIP-KD")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    add_share(parser, OUT)
    options = parser.parse_args()
    path = options.output / "distil.json"
    found = kept_figures(path, options.merge)
    found.setdefault("runs", {})
    share = Share(options.share)
    if not options.table:
        bench = Bench(Store(Path(os.environ["EDGEGLM_STORE"])))
        if found.get("teacher", bench.teacher) != bench.teacher:
            raise SystemExit(f"{path} is of another teacher than the store's; move it away to start anew")
        if found.get("steps", options.steps) != options.steps:
            raise SystemExit(f"{path} has runs of {found['steps']} steps; ask for as many")
        found |= {
            "command": f"scripts/bench/distil.py --seeds {options.seeds} --steps {options.steps}",
            **origin(),
            "steps": options.steps,
            "teacher": bench.teacher,
        }
        for seed in range(options.seeds):
            for name, (terms, _) in ROWS.items():
                if options.matched and name not in MATCHED:
                    continue
                done = found["runs"].setdefault(name, {})
                if str(seed) in done or not share.takes():
                    continue
                done[str(seed)] = bench.run(terms, seed, options.steps) | {"commit": found["commit"]}
                path.write_text(json.dumps(found, indent=1) + "\n")
                sys.stderr.write(f"{name}, seed {seed}: {done[str(seed)]}\n")
    if options.merge:
        path.write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "distil.md").write_text(table(found))


if __name__ == "__main__":
    main()
