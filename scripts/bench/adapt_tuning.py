"""Ways to tune the text tower, each beside full fine-tuning: parameters, step, memory, retrieval.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/adapt_tuning.py [--seeds 1] [--rounds 7] [--ways 12]
        [--device cuda] [--only steps|retrieval] [--share I/N]

STORE is one in which the recipe `default` was built. Steps of all ways are timed in turn in each round, in
CPU time of one thread; a step embeds 128 captions, forward and backward, and steps AdamW. Training memory is
what a step holds besides the weights: tensors saved for the backward pass, gradients, AdamW's moments. With
--device cuda the tower is on the GPU: steps of 512 captions are timed by the clock, in float32 and with
products in bfloat16, and memory is the allocator's own peak. Retrieval: heads, two epochs of tuning and heads
again on labels of one style, as in adapt.py; heads are on the CPU wherever the tower is. Writes
docs/bench/adapt_tuning.json after each run, goes on from it when called again, and writes adapt_tuning.md.
--ways takes only the first so many of the table: full fine-tuning, LoRA and its kept prefixes come first.
"""

from __future__ import annotations

import json
import os
import statistics
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
from adapt_tuning_page import BATCH, GPU_BATCH, table  # noqa: E402
from bench_store import Share, add_share, bench_parser, kept_figures, newest, origin  # noqa: E402

from edgeglm.adapt import batches  # noqa: E402
from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.frozen_prefix import kept_prefix  # noqa: E402
from edgeglm.adapt.sources import source_spec  # noqa: E402
from edgeglm.adapt.text_teacher import TextTeacher, load_text_teacher  # noqa: E402
from edgeglm.adapt.tuning import enable_tuning  # noqa: E402
from edgeglm.assets import fetch_asset  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import TeacherConfig  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402
from edgeglm.train.precision import Precision, mixed  # noqa: E402

TUNED: dict[str, dict[str, Any]] = {
    "full": {"tuning": "full"},
    "LoRA, rank 8": {"tuning": "lora"},
    "LoRA, rank 8, no dropout": {"tuning": "lora", "lora_dropout": 0.0},
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


class Step:
    """One way, ready to step."""

    def __init__(self, teacher: TextTeacher, config: TeacherConfig, texts: list[str]) -> None:
        self.teacher, self.config, self.texts = teacher, config, texts
        self.total = sum(parameter.numel() for parameter in teacher.tower.parameters())
        self.parameters = enable_tuning(teacher, config)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        teacher.tower.train()
        self.kept = kept_prefix(teacher, texts, config.tuned_blocks)
        self.kept.__enter__()

    def step(self, chosen: list[str], precision: Precision = "float32") -> None:
        """Go one step."""
        self.optimizer.zero_grad(set_to_none=True)
        with mixed(precision, self.parameters[0].device.type):
            loss = self.teacher.features(chosen).float().square().mean()
        torch.autograd.backward(loss)
        self.optimizer.step()

    def seconds(self, chosen: list[str]) -> float:
        """Return the CPU time of one step."""
        started = time.process_time()
        self.step(chosen)
        return time.process_time() - started

    def clocked(self, chosen: list[str], precision: Precision) -> tuple[float, int]:
        """Return the seconds of one step on a GPU, and the most bytes it held besides what was there."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        self.step(chosen, precision)
        torch.cuda.synchronize()
        moments = sum(p.numel() for p in self.parameters) * 8  # AdamW's, which are there before
        return time.perf_counter() - started, torch.cuda.max_memory_allocated() - before + moments

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


def reached(
    store: Store, seed: int, changed: dict[str, Any], scratch: Path, device: str
) -> dict[str, list[float]]:
    """Return mAP@10 of a teacher tuned in this way on labels of one style."""
    pairs, features, _ = adapt.prepared(store, scratch)
    pairs = adapt.restricted(pairs, adapt.SETTINGS["noto"])
    ours = {"lora_epochs": 2, "lora_batch_size": BATCH, "warmup_epochs": 1, **changed}
    config = msgspec.structs.replace(adapt.CONFIG, **ours)
    source = fetch_asset(source_spec(config.text), store, QuietProgress())
    with store.scratch() as folder, seeded(seed, threads=1):
        text = load_text_teacher(config.text, source, folder / "text", max_length=32)
        text.tower.to(device)
        concepts = Concepts.of(pairs)
        made = Alignment(features, concepts, text, config, seed=seed, progress=QuietProgress())
        made.run()
        return adapt.measured(made, pairs, text)


def main() -> None:
    """Time all ways in turn, then train each, and keep what was found."""
    parser = bench_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", type=int, default=len(TUNED), help="only the first so many")
    parser.add_argument("--scratch", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")))
    parser.add_argument("--captions", type=int, default=GPU_BATCH, help="in a step on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=["steps", "retrieval"])
    add_share(parser, adapt.OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.output / "adapt_tuning.json"
    found = kept_figures(path, options.merge)
    store = Store(Path(os.environ["EDGEGLM_STORE"]))
    wanted = dict(list(TUNED.items())[: options.ways])
    kind = "steps" if options.device == "cpu" else "gpu_steps"
    if options.only != "retrieval" and any(
        name not in found.get(kind, {}) for name in wanted if name != "frozen"
    ):
        if kind == "steps":
            found[kind] = timed(store, wanted, options.rounds)
            found |= origin()
        else:
            found[kind] = clocked(store, wanted, options.rounds, options.captions)
            found["gpu"] = {
                **origin(),
                "captions": options.captions,
                "machine": f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
            }
        path.write_text(json.dumps(found, indent=1) + "\n")
    batches.MAX_CONCEPTS = adapt.OTHER_CONCEPTS
    share = Share(options.share)
    for seed in range(options.seeds if options.only != "steps" else 0):
        for name, changed in wanted.items():
            runs = found.setdefault("map10", {}).setdefault(name, {})
            if str(seed) not in runs and share.takes():
                runs[str(seed)] = reached(store, seed, changed, options.scratch, options.device)
                found["retrieval"] = {**origin(), "device": options.device}
                path.write_text(json.dumps(found, indent=1) + "\n")
    path.write_text(json.dumps(found, indent=1) + "\n")
    if "steps" in found:
        (options.output / "adapt_tuning.md").write_text(table(found, list(TUNED)))


def ready(
    store: Store, ways: dict[str, dict[str, Any]], count: int, device: str
) -> tuple[dict[str, Step], list[str]]:
    """Return all ways, ready to step, and the texts that they are shown."""
    pairs = PairSet.open(newest(store, "pairs"))
    texts = list(Concepts.of(adapt.restricted(pairs, adapt.SETTINGS["noto"])).texts)
    texts = texts[:count]  # all that the steps show, so that no more prefixes are made
    source = fetch_asset(source_spec(TeacherConfig().text), store, QuietProgress())
    steps: dict[str, Step] = {}
    with store.scratch() as folder:
        for place, (name, changed) in enumerate(ways.items()):
            if name != "frozen":
                text = load_text_teacher(TeacherConfig().text, source, folder / str(place), max_length=32)
                text.tower.to(device)
                steps[name] = Step(text, msgspec.structs.replace(TeacherConfig(), **changed), texts)
    return steps, texts


def clocked(store: Store, ways: dict[str, dict[str, Any]], rounds: int, captions: int) -> dict[str, Any]:
    """Return the share of trained parameters, and by precision step and peak memory against full, by way."""
    steps, texts = ready(store, ways, 2 * captions, "cuda")
    texts = (texts * -(-2 * captions // len(texts)))[: 2 * captions]
    found: dict[str, Any] = {
        name: {"trained": (count := sum(p.numel() for p in step.parameters)), "share": count / step.total}
        for name, step in steps.items()
    }
    for precision in ("float32", "bfloat16"):
        seen: dict[str, list[tuple[float, int]]] = {name: [] for name in steps}
        for round_ in range(rounds + 3):  # three warm up
            start = round_ % 2 * captions
            for name, step in steps.items():
                once = step.clocked(texts[start : start + captions], precision)
                if round_ >= 3:
                    seen[name].append(once)
        for name, own in seen.items():
            found[name][precision] = {
                "ms": round(1e3 * statistics.median(seconds for seconds, _ in own), 3),
                "speedups": [
                    round(whole[0] / mine[0], 3) for whole, mine in zip(seen["full"], own, strict=True)
                ],
                "peak_mb": round(max(held for _, held in own) / 1e6, 1),
                "memory_ratio": max(held for _, held in own) / max(held for _, held in seen["full"]),
            }
    return found


def timed(store: Store, ways: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Return parameters, the median and spread of the step against full, and memory, by way."""
    steps, texts = ready(store, ways, (rounds + 1) * BATCH, "cpu")
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


if __name__ == "__main__":
    main()
