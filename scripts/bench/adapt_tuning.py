"""Ways to tune the text tower, each beside full fine-tuning: parameters, step, memory, retrieval.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/adapt_tuning.py [--seeds 1] [--rounds 7] [--ways 12]

STORE is one in which the recipe `default` was built. Steps of all ways are timed in turn in each round, in
CPU time of one thread; a step embeds 128 captions, forward and backward, and steps AdamW. Training memory is
what a step holds besides the weights: tensors saved for the backward pass, gradients, AdamW's moments.
Retrieval: heads, two epochs of tuning and heads again on labels of one style, as in adapt.py. Writes
docs/bench/adapt_tuning.json after each run, goes on from it when called again, and writes adapt_tuning.md.
--ways takes only the first so many of the table: full fine-tuning, LoRA and its kept prefixes come first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import adapt  # noqa: E402

from edgeglm.adapt import alignment  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.frozen_prefix import kept_prefix  # noqa: E402
from edgeglm.adapt.stages import source_spec  # noqa: E402
from edgeglm.adapt.text_teacher import TextTeacher, load_text_teacher  # noqa: E402
from edgeglm.adapt.tuning import enable_tuning  # noqa: E402
from edgeglm.assets import fetch_asset  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import TeacherConfig  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402

TUNED: dict[str, dict[str, Any]] = {
    "full": {"tuning": "full"},
    "LoRA, rank 8": {"tuning": "lora"},
    "LoRA, last 2 blocks, kept prefix": {"tuning": "lora", "tuned_blocks": 2},
    "LoRA, last block, kept prefix": {"tuning": "lora", "tuned_blocks": 1},
    "frozen": {"lora_epochs": 0},
    "last 2 blocks, kept prefix": {"tuning": "partial", "tuned_blocks": 2},
    "bottleneck adapters": {"tuning": "bottleneck"},
    "IA3": {"tuning": "ia3", "lora_learning_rate": 1e-2},
    "prompt tuning": {"tuning": "prompt", "lora_learning_rate": 1e-2},
    "P-tuning": {"tuning": "p-tuning"},
    "rsLoRA": {"tuning": "rslora"},
    "DoRA": {"tuning": "dora"},
}
BATCH = 128
#: What the figures show, written once they were there.
NOTES: tuple[str, ...] = (
    "A dash was not run. CPU time was taken while much other work ran on both cores, without the lock that "
    "keeps timings apart: hence the spread. Step and memory leave out what keeping a prefix costs: one pass "
    "of the captions through the frozen blocks, and 1.5 kB a token. Memory is summed from saved tensors, and "
    "is no measured peak.",
    "LoRA on all blocks is over 1.4 times faster in the median, but not in every round. What takes it "
    "beyond 3 times is the kept prefix of frozen blocks, not larger batches. Whether retrieval stays within "
    "0.995 of full fine-tuning is open wherever the last column is empty.",
)


class Step:
    """One way, ready to step."""

    def __init__(self, teacher: TextTeacher, config: TeacherConfig, texts: list[str]) -> None:
        self.teacher, self.config, self.texts = teacher, config, texts
        self.total = sum(parameter.numel() for parameter in teacher.tower.parameters())
        self.parameters = enable_tuning(teacher, config)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6)
        teacher.tower.train()
        self.kept = kept_prefix(teacher, texts, config.tuned_blocks)
        self.kept.__enter__()

    def seconds(self, chosen: list[str]) -> float:
        """Return the CPU time of one step."""
        started = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.teacher.features(chosen).square().mean())
        self.optimizer.step()
        return time.process_time() - started

    def memory(self, chosen: list[str]) -> int:
        """Return the bytes that a step holds besides the weights."""
        held: dict[int, int] = {}
        weights = {parameter.data_ptr() for parameter in self.teacher.tower.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.teacher.features(chosen).square().mean()
        del loss
        trained = sum(parameter.numel() for parameter in self.parameters)
        return sum(held.values()) + 3 * 4 * trained


def reached(store: Store, seed: int, changed: dict[str, Any], scratch: Path) -> dict[str, list[float]]:
    """Return mAP@10 of a teacher tuned in this way on labels of one style."""
    pairs, features, _ = adapt.prepared(store, scratch)
    pairs = adapt.restricted(pairs, adapt.SETTINGS["noto"])
    ours = {"lora_epochs": 2, "lora_batch_size": BATCH, "warmup_epochs": 1, **changed}
    config = msgspec.structs.replace(adapt.CONFIG, **ours)
    source = fetch_asset(source_spec(config.text), store, QuietProgress())
    with store.scratch() as folder, seeded(seed, threads=1):
        text = load_text_teacher(config.text, source, folder / "text", max_length=32)
        concepts = Concepts.of(pairs)
        made = Alignment(features, concepts, text, config, seed=seed, progress=QuietProgress())
        made.run()
        return adapt.measured(made, pairs, text)


def main() -> None:
    """Time all ways in turn, then train each, and keep what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", type=int, default=len(TUNED), help="only the first so many")
    parser.add_argument("--scratch", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")))
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = adapt.OUT / "adapt_tuning.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    store = Store(Path(os.environ["EDGEGLM_STORE"]))
    wanted = dict(list(TUNED.items())[: options.ways])
    if any(name not in found.get("steps", {}) for name in wanted if name != "frozen"):
        said = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        found["machine"] = f"{os.cpu_count()} shared {platform.machine()} CPU cores, one thread"
        found["commit"] = subprocess.run(said, capture_output=True, text=True, check=True).stdout.strip()
        found["steps"] = timed(store, wanted, options.rounds)
        path.write_text(json.dumps(found, indent=1) + "\n")
    alignment.MAX_CONCEPTS = adapt.OTHER_CONCEPTS
    for seed in range(options.seeds):
        for name, changed in wanted.items():
            runs = found.setdefault("map10", {}).setdefault(name, {})
            if str(seed) not in runs:
                runs[str(seed)] = reached(store, seed, changed, options.scratch)
                path.write_text(json.dumps(found, indent=1) + "\n")
                (adapt.OUT / "adapt_tuning.md").write_text(table(found))
    (adapt.OUT / "adapt_tuning.md").write_text(table(found))


def timed(store: Store, ways: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Return parameters, the median and spread of the step against full, and memory, by way."""
    pairs = adapt.PairSet.open(adapt.newest(store, "pairs"))
    texts = list(Concepts.of(adapt.restricted(pairs, adapt.SETTINGS["noto"])).texts)
    texts = texts[: (rounds + 1) * BATCH]  # all that the steps show, so that no more prefixes are made
    source = fetch_asset(source_spec(TeacherConfig().text), store, QuietProgress())
    steps: dict[str, Step] = {}
    with store.scratch() as folder:
        for place, (name, changed) in enumerate(ways.items()):
            if name != "frozen":
                text = load_text_teacher(TeacherConfig().text, source, folder / str(place), max_length=32)
                steps[name] = Step(text, msgspec.structs.replace(TeacherConfig(), **changed), texts)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):  # the first warms up
        chosen = texts[round_ * BATCH : (round_ + 1) * BATCH]
        for name, step in steps.items():
            spent = step.seconds(chosen)
            if round_:
                times[name].append(spent)
    full_memory = steps["full"].memory(texts[:BATCH])
    return {
        name: {
            "trained": (count := sum(parameter.numel() for parameter in step.parameters)),
            "share": count / step.total,
            "speedup": statistics.median(
                whole / own for whole, own in zip(times["full"], times[name], strict=True)
            ),
            "speedups": [
                round(whole / own, 3) for whole, own in zip(times["full"], times[name], strict=True)
            ],
            "memory_ratio": step.memory(texts[:BATCH]) / full_memory,
        }
        for name, step in steps.items()
    }


def table(found: dict[str, Any]) -> str:
    """Return the whole page."""
    lines = [
        "# Ways to tune a text tower (MiniLM-L6), beside full fine-tuning",
        "",
        f"Made by `scripts/bench/adapt_tuning.py` at commit {found['commit']} on {found['machine']}.",
        "",
        f"A step embeds {BATCH} captions, forward and backward, and steps AdamW. 'faster' is the CPU time of "
        "a step of full fine-tuning over that of the way (median, lowest and highest of "
        f"{len(found['steps']['full']['speedups'])} interleaved rounds); 'memory' what a step holds besides "
        "weights (saved activations, gradients, AdamW's moments) against full. mAP@10 on twemoji from "
        "labels of noto with small heads on projected features; 'ratio' is the sum of both catalogue tracks "
        "to full's, of the seeds that both ran.",
        "",
        "| way | trained | share | faster than full | memory | seeds | transductive | inductive | unseen "
        "| ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- | ---: |",
    ]
    scored = found.get("map10", {})
    lines += [
        row(name, found["steps"].get(name), scored.get(name, {}), scored.get("full", {})) for name in TUNED
    ]
    return "\n".join([*lines, "", *(f"{note}\n" for note in NOTES)])


def row(name: str, step: dict[str, Any] | None, runs: dict[str, Any], full: dict[str, Any]) -> str:
    """Return one line of the table; what was not run is a dash."""
    cells = ["0", "0 %", "-", "-"] if name == "frozen" else ["-"] * 4
    if step is not None:
        low, high = min(step["speedups"]), max(step["speedups"])
        cells = [
            f"{step['trained']:,}",
            f"{step['share']:.2%}",
            f"{step['speedup']:.2f}x ({low:.2f} to {high:.2f})",
            f"{step['memory_ratio']:.2f}x",
        ]
    tracks = adapt.TRACKS
    scores = [adapt.interval([r[t][0] for r in runs.values()]) if runs else "-" for t in tracks]
    ratio = "-"
    if both := [seed for seed in runs if seed in full]:
        own, whole = (sum(way[s][t][0] for s in both for t in tracks[:2]) for way in (runs, full))
        ratio = f"{own / whole:.3f}"
    return f"| {name} | {' | '.join(cells)} | {len(runs) or '-'} | {' | '.join(scores)} | {ratio} |"


if __name__ == "__main__":
    main()
