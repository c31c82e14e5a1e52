"""Steps per second of the image student: on cached targets, and with the teacher asked in every step.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/distil_cached.py [--steps 120] [--rounds 9]

STORE is one in which the recipe `default` was built. Both ways see the same images, views and order, drawn
by the same seeds, and ask for the teacher's answer to the very view (`student.image_target = "each"`); a
third asks the teacher for the mean of its views, as the recipe does from the cache. First both train for some
steps and are evaluated; then steps are timed in turn. Writes docs/bench/distil_cached.json and .md.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench_store import bench_parser, newest  # noqa: E402

from edgeglm.adapt.backbones import read_backbones  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import StudentConfig  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.data.tokenization import teacher_tokenizer  # noqa: E402
from edgeglm.distill.image_student import front_activations, image_student  # noqa: E402
from edgeglm.distill.stages import student_inputs  # noqa: E402
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine  # noqa: E402
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE, evaluate_tracks  # noqa: E402
from edgeglm.evaluate.towers import TextSettings, gallery_images, text_embeddings  # noqa: E402
from edgeglm.models.projection import normalized  # noqa: E402
from edgeglm.models.published import lite0_state  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402
from edgeglm.train.losses import embedding_distance, similarity_divergence  # noqa: E402
from edgeglm.train.views import Views  # noqa: E402

OUT = ROOT / "docs" / "bench"
CONFIG = StudentConfig()
THREADS = 2
Batch = tuple[Tensor, Tensor]
Ask = Callable[[Batch], tuple[Tensor, Tensor]]


class Bench:
    """The data of a store, and both ways to a batch's input and target."""

    def __init__(self, store: Store) -> None:
        """Open pairs, teacher and caches; make the frozen layers' activations, timed."""
        self.pairs = PairSet.open(newest(store, "pairs"))
        self.teacher, backbones = newest(store, "teacher").path, newest(store, "backbones").path
        self.target_VND = torch.from_numpy(np.load(self.teacher / "image_embeddings.npy"))
        self.views = len(self.target_VND)
        self.used = torch.from_numpy(np.sort(self.pairs.by_role("labelled", "unlabelled")))
        (backbone,) = read_backbones(backbones)
        self.side = backbone.resolution
        self.drawn = {
            side: Views(self.pairs, self.views, seed=0, resolution=side)
            for side in (self.side, CONFIG.resolution)
        }
        self.backbone = OnnxRuntimeEngine(backbones / backbone.file, threads=THREADS)
        self.head = OnnxRuntimeEngine(self.teacher / "image-head.onnx", threads=THREADS)
        self.backbone.load()
        self.head.load()
        self.inherit = lite0_state(student_inputs(CONFIG, store, QuietProgress())["inherit"])
        self.frozen = CONFIG.frozen_blocks
        texts = json.loads((newest(store, "targets").path / "texts.json").read_text("utf-8"))
        rows = torch.from_numpy(np.load(newest(store, "targets").path / "text_embeddings.npy"))
        self.anchor_KD = rows[: len(Concepts.of(self.pairs).texts)][Concepts.of(self.pairs).names()]
        assert len(texts) == len(rows)
        self.tower = self.fresh()
        started = time.perf_counter()
        self.front_VU = front_activations(
            self.tower, self.pairs, self.used, self.views, self.frozen, resolution=CONFIG.resolution, seed=0
        )
        self.front_seconds = time.perf_counter() - started

    def fresh(self) -> Any:
        """Return a new student as every way begins with."""
        with seeded(0, threads=THREADS):
            tower: Any = image_student(CONFIG, embedding_dim=self.target_VND.shape[2], inherit=self.inherit)
        tower.to(memory_format=torch.channels_last)
        tower.train()
        for module in tower.trunk.part(self.frozen):
            module.requires_grad_(False)
            module.eval()
        return tower

    def batches(self, count: int) -> list[Batch]:
        """Return views and places among the used images: int64 [B] each."""
        rng, size = np.random.default_rng(7), CONFIG.image_batch_size
        return [
            (
                torch.from_numpy(rng.integers(0, self.views, size)),
                torch.from_numpy(rng.choice(len(self.used), size, replace=False)),
            )
            for _ in range(count)
        ]

    def cached(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Look both up."""
        view_B, place_B = batch
        front_BCHW = self.front_VU[view_B, place_B].float()
        return front_BCHW, self.target_VND[view_B, self.used[place_B]]

    def online(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Distort, run the frozen layers, ask the teacher about the same view."""
        view_B, place_B = batch
        return self._front(view_B, place_B), self._asked(view_B, place_B)

    def online_mean(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same, with the teacher asked about every view."""
        view_B, place_B = batch
        said = [self._asked(torch.full_like(view_B, view), place_B) for view in range(self.views)]
        return self._front(view_B, place_B), normalized(torch.stack(said).mean(0))

    def _seen(self, view_B: Tensor, place_B: Tensor, side: int) -> Tensor:
        chosen = self.used[place_B]
        seen = torch.empty(len(chosen), 3, side, side)
        for view in sorted(set(view_B.tolist())):
            rows = view_B == view
            seen[rows] = self.drawn[side].one(view, chosen[rows])
        return seen

    @torch.no_grad()
    def _front(self, view_B: Tensor, place_B: Tensor) -> Tensor:
        x = self._seen(view_B, place_B, CONFIG.resolution).contiguous(memory_format=torch.channels_last)
        front: Tensor = self.tower.trunk.front(x, self.frozen)
        return front

    def _asked(self, view_B: Tensor, place_B: Tensor) -> Tensor:
        pixels = self._seen(view_B, place_B, self.side).numpy()
        features = self.backbone.infer({"pixels": pixels})["features"]
        (name,) = (tensor.name for tensor in self.head.inputs)
        (rows,) = self.head.infer({name: features.astype(np.float32)}).values()
        return torch.from_numpy(np.array(rows))

    def stepper(self, tower: Any, ask: Ask) -> Callable[[Batch], float]:
        """Return what does one step and gives its loss."""
        optimizer = torch.optim.AdamW([p for p in tower.parameters() if p.requires_grad], lr=1e-3)

        def step(batch: Batch) -> float:
            front, target_BD = ask(batch)
            x = front.contiguous(memory_format=torch.channels_last)
            student_BD = tower.head(tower.trunk.rest(x, self.frozen)[0])
            loss = CONFIG.distance_weight * embedding_distance(student_BD, target_BD)
            loss = loss + similarity_divergence(
                student_BD,
                target_BD,
                self.anchor_KD,
                temperature=CONFIG.temperature,
                softening=CONFIG.softening,
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return float(loss.detach())

        return step

    def map10(self, tower: Any) -> float:
        """Return mAP@10 on the inductive names, with the teacher's texts."""
        tower.eval()
        tokenizer, settings = teacher_tokenizer(self.teacher)
        tracks = [track for track in self.pairs.tracks if track.name == "catalogue-inductive"]
        said = TextSettings(tokenizer=tokenizer, max_length=settings.max_length)
        chosen = gallery_images(tracks)
        rows = np.zeros((len(self.pairs), self.target_VND.shape[2]), np.float32)
        with torch.no_grad():
            for start in range(0, len(chosen), 256):
                part = chosen[start : start + 256]
                pixels = self.pairs.shown(part, CONFIG.resolution)
                rows[part] = tower(torch.from_numpy(pixels)).numpy()
        found = evaluate_tracks(
            tracks,
            lambda texts: text_embeddings(self.teacher / "text.onnx", texts, said, threads=THREADS),
            rows,
            bootstrap=0,
        )
        return found["catalogue-inductive"].map10.value


def main() -> None:
    """Compare, time, write."""
    parser = bench_parser(__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    bench = Bench(Store(Path(os.environ["EDGEGLM_STORE"])))
    ways: dict[str, Ask] = {
        "cached": bench.cached,
        "online, the same view": bench.online,
        "online, the mean of the views": bench.online_mean,
    }
    batches = bench.batches(options.steps)
    kept, asked = bench.cached(batches[0]), bench.online(batches[0])
    cosine = float((kept[1] * asked[1]).sum(1).min())
    front = float((kept[0] - asked[0]).abs().max() / kept[0].abs().max())
    trained = {}
    for name in list(ways)[:2]:
        tower = bench.fresh()
        step = bench.stepper(tower, ways[name])
        losses = [step(batch) for batch in batches]
        trained[name] = {"loss": statistics.mean(losses[-10:]), "map10": bench.map10(tower)}
    steppers = {name: bench.stepper(bench.fresh(), ask) for name, ask in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, step in steppers.items():
            started = time.perf_counter()
            for batch in batches[:3]:
                step(batch)
            if turn:  # the first warms up
                seconds[name].append((time.perf_counter() - started) / 3)
    said = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: [online / cached for online, cached in zip(values, seconds["cached"], strict=True)]
        for name, values in seconds.items()
    }
    found = {
        "command": f"scripts/bench/distil_cached.py --steps {options.steps} --rounds {options.rounds}",
        "commit": subprocess.run(said, capture_output=True, text=True, check=True).stdout.strip(),
        "machine": f"{os.cpu_count()} shared {platform.machine()} CPU cores",
        "student": CONFIG.size,
        "batch": CONFIG.image_batch_size,
        "seconds_a_step": median,
        "ratio": {
            name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for name, values in ratios.items()
        },
        "target_cosine_min": cosine,
        "front_relative_max": front,
        "trained": trained,
        "front_seconds": bench.front_seconds,
    }
    (OUT / "distil_cached.json").write_text(json.dumps(found, indent=1) + "\n")
    (OUT / "distil_cached.md").write_text(page(found))


def page(found: dict[str, Any]) -> str:
    """Return the table."""
    trained = list(found["trained"].values())
    lines = [
        "# Cached and online distillation",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}.",
        "",
        f"A step of the image student `{found['student']}` on {found['batch']} images. The cache holds the "
        "teacher's embedding of every view and the activation of the student's frozen layers; online, the "
        "picture is distorted at both resolutions, and teacher and frozen layers run, in every step. The "
        "trained part of a step is the same. Medians over rounds in turn, range of the ratio in brackets.",
        "",
        "| way | cached is faster |",
        "| --- | ---: |",
    ]
    lines += [
        f"| {name} | {ratio['median']:.1f}x ({ratio['low']:.1f} to {ratio['high']:.1f}) |"
        for name, ratio in found["ratio"].items()
        if name != "cached"
    ]
    lines += [
        "",
        "Views are drawn by seed, so both ways see the same numbers: in a batch the targets' worst cosine is "
        f"{found['target_cosine_min']:.5f}, and activations differ by {found['front_relative_max']:.0e} of "
        "the largest (the cache is FP16). Trained on the same batches, the two end at a loss of "
        f"{trained[0]['loss']:.3f} and {trained[1]['loss']:.3f}, and at an mAP@10 of "
        f"{trained[0]['map10']:.3f} and {trained[1]['map10']:.3f} (inductive names, a short run). "
        f"{ONE_RELEVANT_NOTE} The activations took {found['front_seconds']:.0f} s to make; the teacher's "
        "part of the cache is made once for all students.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
