"""The page of adapt_tuning.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench_store import interval

from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE

TRACKS = ("catalogue-transductive", "catalogue-inductive", "unseen")
BATCH = 128
GPU_BATCH = 512
#: What the figures show, written once they were there.
NOTES: tuple[str, ...] = (
    "Step and memory leave out what keeping a prefix costs: one pass of the captions through the "
    "frozen blocks, and 1.5 kB a token. Memory on the CPU is summed from saved tensors, and is no "
    "measured peak; on the GPU it is the allocator's.",
    "On the CPU, LoRA on all blocks is 1.29 times faster in the median (1.24 at 28d9871, and 1.5 at "
    "30fa47f on a processor with AVX-512), short of the aim of 1.4; without dropout, where a layer is one "
    "product, 1.42 (1.36 by peft's layers, whose forward and backward go over the activations three times "
    "more). More is not to be had on all blocks: training nothing but the biases of those layers is 1.44 to "
    "1.48 times faster, for the rest of a step is the tower's own (it and the 1.36: three runs of 7 and 11 "
    "rounds at ebb4f0e, no script was kept). What takes it to 3.9 and 8.2 times is"
    " the kept prefix of frozen blocks, not larger batches. On an H200 a tower of 22 M parameters is bound"
    " by the launches of its kernels: LoRA adds some, and is no faster on all blocks at any batch that was "
    "tried (0.87x at 128 captions, 0.99x at 1,024); with a kept prefix it is 2.7x at 128. Its share "
    "of the memory grows with the batch, 0.39x at 128 captions, 0.69x at 1,024, as activations "
    "outgrow gradients and moments (`gpu_1024` in the JSON has the rows at 1,024).",
    "Retrieval of LoRA is 1.000 of full fine-tuning on all blocks, 0.996 without dropout (five seeds), and "
    "0.998 on the last one alone, at 8.2 times the speed there; the aim is 0.995. How far that goes: the "
    "ratio of one seed is 0.96 to 1.03, and with the tower on an H200 (f5efcb1) the means were 0.978 on all "
    "blocks and 0.994 on the last. Rows of three seeds, and those seeds of full and of LoRA with dropout, "
    "were run at 4efba12. The last two blocks themselves, over a kept prefix, are at 1.000 here as there, "
    "3.2 times faster, with 0.23 of the memory and 16 % of the parameters.",
)


def table(found: dict[str, Any], names: Sequence[str]) -> str:
    """Return the whole page."""
    lines = [
        "# Ways to tune a text tower (MiniLM-L6), beside full fine-tuning",
        "",
        f"Steps made by `scripts/bench/adapt_tuning.py` at commit {found['commit']} on {found['machine']}, "
        "one thread"
        + (
            f"; retrieval at commit {made['commit']}, the tower on {made['device']}, heads on one thread, "
            f"torch {made['machine'].rpartition(' ')[2]}."
            if (made := found.get("retrieval"))
            else "."
        ),
        "",
        f"A step embeds {BATCH} captions, forward and backward, and steps AdamW. 'faster' is the CPU time of "
        "a step of full fine-tuning over that of the way (median, lowest and highest of "
        f"{len(found['steps']['full']['speedups'])} interleaved rounds); 'memory' what a step holds besides "
        "weights (saved activations, gradients, AdamW's moments) against full. mAP@10 on twemoji from "
        "labels of noto with small heads on projected features; 'ratio' is the sum of both catalogue tracks "
        f"to full's, of the seeds that both ran. {ONE_RELEVANT_NOTE}",
        "",
        "| way | trained | share | faster than full | memory | seeds | transductive | inductive | unseen "
        "| ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- | ---: |",
    ]
    scored = found.get("map10", {})
    lines += [
        row(name, found["steps"].get(name), scored.get(name, {}), scored.get("full", {})) for name in names
    ]
    if "gpu_steps" in found:
        lines += ["", *gpu_table(found)]
    return "\n".join([*lines, "", *(f"{note}\n" for note in NOTES)])


def gpu_table(found: dict[str, Any]) -> list[str]:
    """Return the part of the page about a GPU."""
    made = found["gpu"]
    lines = [
        "## On a GPU",
        "",
        f"`scripts/bench/adapt_tuning.py --device cuda --only steps` at commit {made['commit']} on "
        f"{made['machine']}. Steps of {made['captions']} captions, by the clock; peak is what the allocator "
        "held at most in a step besides weights, AdamW's moments added.",
        "",
        "| way | trained | float32: step ms | faster than full | peak MB | of full | bfloat16: step ms "
        "| faster than full | peak MB | of full |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, step in found["gpu_steps"].items():
        cells = [f"{step['share']:.2%}"]
        for precision in ("float32", "bfloat16"):
            own = step[precision]
            low, high = min(own["speedups"]), max(own["speedups"])
            cells += [
                f"{own['ms']:.1f}",
                f"{statistics.median(own['speedups']):.2f}x ({low:.2f} to {high:.2f})",
                f"{own['peak_mb']:.0f}",
                f"{own['memory_ratio']:.2f}x",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


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
    tracks = TRACKS
    scores = [interval([r[t][0] for r in runs.values()]) if runs else "-" for t in tracks]
    ratio = "-"
    if both := [seed for seed in runs if seed in full]:
        own, whole = (sum(way[s][t][0] for s in both for t in tracks[:2]) for way in (runs, full))
        ratio = f"{own / whole:.3f}"
    return f"| {name} | {' | '.join(cells)} | {len(runs) or '-'} | {' | '.join(scores)} | {ratio} |"
