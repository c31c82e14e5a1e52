"""Kinds of students at equal steps: what branches, a ViT, an heir and a smaller vocabulary do.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/students.py [--seeds 3] [--steps 500]

STORE is one in which the recipe `default` was built. Both towers are trained together by the recipe's own
terms, on the same batches in every row; a row differs in the student alone. Latency is of exported FP32
files in ONNX Runtime, one thread, all rows interleaved in one run; it does not hang on what was learnt, so
the files are of towers as they start. With --share it is left out. Writes docs/bench/students.json after each
run, goes on from it, and writes students.md.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from bench_store import Share, add_share, bench_parser, kept_figures, newest, origin
from distil import CONFIG, OUT, Bench, _ranged

from edgeglm.adapt.sources import source_spec
from edgeglm.assets import fetch_asset
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import StudentConfig
from edgeglm.core.store import Store
from edgeglm.data.tokenization import Tokenizer, teacher_tokenizer
from edgeglm.data.vocabulary import trimmed_tokenizer
from edgeglm.distill.image_student import image_student
from edgeglm.distill.joint import RECIPE
from edgeglm.distill.text_student import text_student
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.protocol import Engine, Feeds
from edgeglm.engines.timing import compare_latency
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE
from edgeglm.export.torch_to_onnx import onnx_from_module
from edgeglm.models.heirs import inherit_text
from edgeglm.models.pretrained_hf import load_text_tower
from edgeglm.models.published import text_model_folder
from edgeglm.models.student_shapes import student_shape

TEACHER = "minilm-l6"
LENGTH = 8  # tokens of a text that is timed
ROWS: dict[str, tuple[StudentConfig, str]] = {
    "edge-xs": (CONFIG, "the smallest of the family"),
    "edge-xs, branches": (msgspec.structs.replace(CONFIG, branches=True), "RepVGG, Ding et al., 2021"),
    "edge-xs, 8,000 entries": (msgspec.structs.replace(CONFIG, vocabulary=8_000), "Abdaoui et al., 2020"),
    "edge-vit": (msgspec.structs.replace(CONFIG, size="edge-vit"), "ViT, Dosovitskiy et al., 2021"),
    "edge-heir": (msgspec.structs.replace(CONFIG, size="edge-heir"), "TinyCLIP, Wu et al., 2023"),
    "edge-heir-s": (msgspec.structs.replace(CONFIG, size="edge-heir-s"), "the recipe's; TinyCLIP"),
    "edge-heir, 8,000 entries": (
        msgspec.structs.replace(CONFIG, size="edge-heir", vocabulary=8_000),
        "both",
    ),
    "edge-s": (msgspec.structs.replace(CONFIG, size="edge-s"), "ALBERT's table, Lan et al., 2019"),
}


class StudentBench(Bench):
    """A bench whose text tower may be an heir, on a vocabulary of its own."""

    def __init__(self, store: Store, config: StudentConfig, folder: Path, *, trains: bool = True) -> None:
        """Trim the tokenizer and load what an heir inherits."""
        super().__init__(store, config, trains=trains)
        teacher = newest(store, "teacher").path
        self.kept: Any = None
        if config.vocabulary:
            _, settings = teacher_tokenizer(teacher)
            trimmed = trimmed_tokenizer(
                teacher / "tokenizer.json",
                self.pairs.training_texts(),
                count=config.vocabulary,
                lowercase=settings.lowercase,
            )
            (folder / "tokenizer.json").write_text(trimmed.text, "utf-8")
            self.tokenizer = Tokenizer(folder / "tokenizer.json", lowercase=settings.lowercase)
            self.kept = torch.from_numpy(trimmed.kept)
            self.words = self.words[self.kept]
        self.model: Any = None
        if student_shape(config.size).heir:
            source = fetch_asset(source_spec(TEACHER), store, QuietProgress())
            self.model = load_text_tower(text_model_folder(TEACHER, source, folder / "text")).encoder

    def started_text(self, config: StudentConfig) -> Any:
        """Return the tower, an heir with its layers."""
        tower = text_student(config, embedding_dim=self.dim, words_WD=self.words)
        if self.model is not None:
            inherit_text(tower, self.model, self.kept)
        return tower

    def exported(self, folder: Path) -> None:
        """Write towers as they start as ONNX."""
        config = msgspec.structs.replace(self.config, max_length=self.max_length)
        self.towers = {
            "image": image_student(config, embedding_dim=self.dim, inherit=self.inherit).eval(),
            "text": self.started_text(config).eval(),
        }
        side = self.config.resolution
        pixels = {"pixels": torch.rand(2, 3, side, side)}
        onnx_from_module(
            self.towers["image"], pixels, folder / "image.onnx", dynamic_axes={"pixels": {0: "batch"}}
        )
        ids, free = torch.ones(2, LENGTH, dtype=torch.int64), {0: "batch", 1: "length"}
        onnx_from_module(
            self.towers["text"],
            {"input_ids": ids, "attention_mask": ids},
            folder / "text.onnx",
            dynamic_axes={"input_ids": free, "attention_mask": free},
        )

    def parameters(self) -> dict[str, int]:
        """Return how many weights each tower has."""
        return {kind: sum(p.numel() for p in tower.parameters()) for kind, tower in self.towers.items()}


def timed(folders: dict[str, Path], side: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of one image and one text, by row; all rows interleaved."""
    rng = np.random.default_rng(0)
    ids = np.ones((1, LENGTH), np.int64)
    feeds: dict[str, Feeds] = {
        "image": {"pixels": rng.random((1, 3, side, side), dtype=np.float32)},
        "text": {"input_ids": ids, "attention_mask": ids},
    }
    found: dict[str, dict[str, float]] = {name: {} for name in folders}
    for kind, feed in feeds.items():
        with ExitStack() as stack:
            calls: dict[str, tuple[Engine, Feeds]] = {
                name: (
                    stack.enter_context(
                        OnnxRuntimeEngine(folder / f"{kind}.onnx", threads=1, spinning=False)
                    ),
                    feed,
                )
                for name, folder in folders.items()
            }
            for name, latency in compare_latency(calls, rounds=15).items():
                found[name][kind] = round(latency.median_ms, 3)
    return found


def table(found: dict[str, Any]) -> str:
    """Return the page."""
    tracks = list(found["teacher"])
    timed_on = found.get("timed_on")
    lines = [
        "# Kinds of students, at equal steps",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}.",
        "",
        f"mAP@10 after {found['steps']} steps of both towers together, by the recipe's own terms, mean over "
        "seeds and half the range. The schedule is short: figures compare the kinds and lie below those of "
        f"the recipe. {ONE_RELEVANT_NOTE} 'six' is the mean over the tracks. Parameters are in millions. "
        "Milliseconds are of one "
        f"image and one text of {LENGTH} tokens, FP32 in ONNX Runtime, one thread, rows interleaved"
        + (f", at commit {timed_on['commit']} on {timed_on['machine']}." if timed_on else "."),
        "",
        f"| student | source | {' | '.join(tracks)} | six | parameters: image, text | ms: image, text "
        "| seeds | CPU s |",
        f"| --- | --- |{' --- |' * len(tracks)} --- | ---: | ---: | ---: | ---: |",
    ]
    for name, (_, source) in ROWS.items():
        seeds = list(found["runs"].get(name, {}).values())
        if not seeds:
            lines.append(f"| {name} | {source} |{' - |' * len(tracks)} - | - | - | 0 | - |")
            continue
        values = [_ranged([seed["map10"][track] for seed in seeds]) for track in tracks]
        six = _ranged([statistics.mean(seed["map10"].values()) for seed in seeds])
        size = ", ".join(f"{seeds[0]['parameters'][kind] / 1e6:.2f}" for kind in ("image", "text"))
        times = found["latency_ms"].get(name)
        cost = ", ".join(f"{times[kind]:.2f}" for kind in ("image", "text")) if times else "-"
        cpu = statistics.mean(seed["cpu_s"] for seed in seeds)
        lines.append(
            f"| {name} | {source} | {' | '.join(values)} | {six} | {size} | {cost} | {len(seeds)} "
            f"| {cpu:.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run what is missing, then write the table."""
    parser = bench_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    add_share(parser, OUT)
    options = parser.parse_args()
    path = options.output / "students.json"
    found = {"runs": {}, "latency_ms": {}, **kept_figures(path, options.merge)}
    share = Share(options.share)
    if any(len(found["runs"].get(name, {})) < options.seeds for name in ROWS):
        found |= {
            "command": f"scripts/bench/students.py --seeds {options.seeds} --steps {options.steps}",
            "steps": options.steps,
            **origin(),
        }
    store = Store(Path(os.environ["EDGEGLM_STORE"]))
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / str(place) for place, name in enumerate(ROWS)}
        for name, (config, _) in ROWS.items():
            done = found["runs"].setdefault(name, {})
            missing = [seed for seed in range(options.seeds) if str(seed) not in done]
            if not missing or not share.takes():
                continue
            folders[name].mkdir()
            bench = StudentBench(store, config, folders[name])
            found["teacher"] = bench.teacher
            for seed in missing:
                done[str(seed)] = bench.run(RECIPE, seed, options.steps)
                done[str(seed)]["parameters"] = bench.parameters()
                path.write_text(json.dumps(found, indent=1) + "\n")
                sys.stderr.write(f"{name}, seed {seed}: {done[str(seed)]['map10']}\n")
        if share.of == 1:
            for name, (config, _) in ROWS.items():
                folders[name].mkdir(exist_ok=True)
                StudentBench(store, config, folders[name], trains=False).exported(folders[name])
            found["latency_ms"] = timed(folders, CONFIG.resolution)
            found["timed_on"] = origin()
    path.write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "students.md").write_text(table(found))


if __name__ == "__main__":
    main()
