"""What adapting and distilling aim at, beside what was measured: one table out of the others' figures.

    .venv/bin/python scripts/bench/transfer_aims.py

Measures nothing: reads what the other benches left in docs/bench and writes docs/bench/transfer_aims.md.
Run it after any of them; a test holds the page to their files.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[2] / "docs" / "bench"
FULL, LORA = (
    "full",
    (
        "LoRA, rank 8",
        "LoRA, rank 8, no dropout",
        "LoRA, last 2 blocks, kept prefix",
        "LoRA, last block, kept prefix",
    ),
)
NAMES = ("catalogue-transductive", "catalogue-inductive")
#: Led in adapt.md, among pictures that were there unlabelled, from one style.
FINALIST = "MMD, weight 10 + pseudo-labels"
#: As in the recipe ``auxiliary``.
ICONS = "icons first, a quarter replayed"
#: How far retrieval may fall where the pictures were never seen.
NEAR = 0.05
#: What is labelled: what a row calls it, and what is asked of names where pictures were there unlabelled.
_ASKED = {
    "noto": ("labels of one style", (0.50, 0.65)),
    "four styles": ("labels of four styles", (0.75, 0.85)),
}


@dataclass(frozen=True, kw_only=True)
class Aim:
    """One row: ``reach`` and ``beyond`` are None where nothing was asked."""

    what: str
    measured: str
    value: float
    reach: float | None
    beyond: float | None = None
    page: str
    unit: str = ""
    less: bool = False

    @property
    def verdict(self) -> str:
        """How far it goes."""
        if self.reach is None:
            return "reported"
        if self.beyond is not None and self._at_least(self.beyond):
            return "beyond"
        return "reached" if self._at_least(self.reach) else "**missed**"

    def _at_least(self, asked: float) -> bool:
        return self.value <= asked if self.less else self.value >= asked


def aims(folder: Path) -> Iterator[Aim]:
    """Yield every row, from the files in ``folder``."""
    yield from _retrieval(
        _read(folder, "adapt-recipe"),
        _read(folder, "adapt_images")["runs"],
        _read(folder, "adapt_auxiliary")["recipe"],
    )
    for run in _read(folder, "adapt_heads").get("teachers", []):
        labels, asked = _ASKED[run["setting"]]
        yield from _ways_retrieval(f"{labels}, {run['called']}", [run], asked, "adapt_heads")
    for name in ("unlabelled", "auxiliary"):
        yield from _student_names(name, _read(folder, f"build_{name}"))
    yield from _tuning(_read(folder, "adapt_tuning"))
    for name, page_ in (("default", "build"), ("auxiliary", "build_auxiliary")):
        build = _read(folder, page_)
        yield from _student(build, name, page_)
        yield from _faster(build["latency_ms"], "fp32", name, page_)
    yield from _faster(_read(folder, "build_cpu")["latency_ms"], "int8", "default", "build_cpu")
    yield from _controls(_read(folder, "distil"))
    cached = _read(folder, "distil_cached")["ratio"]["online, the same view"]["median"]
    yield Aim(
        what="cached / online distillation, steps a second at equal final mAP",
        measured=f"{cached:.1f}",
        value=cached,
        reach=3.0,
        beyond=6.0,
        page="distil_cached",
        unit="x",
    )
    parts = _read(folder, "new_domain")["parts_s"]
    seconds = parts["adapt"] + parts["distil"]
    yield Aim(
        what="a new domain of 1,000 pairs, adapt and distil on two cores",
        measured=f"{seconds:.0f}",
        value=seconds,
        reach=480,
        page="new_domain",
        unit=" s",
        less=True,
    )


def _retrieval(recipe: dict[str, Any], finalists: dict[str, Any], icons: dict[str, Any]) -> Iterator[Aim]:
    """Yield what teachers reach.

    By pseudo-labels, by the finalist that led among unlabelled pictures, and after icons of other domains.
    """
    for setting, (labels, asked) in _ASKED.items():
        found = finalists[setting][FINALIST]
        tuned = found.get("images", {})
        runs = list((tuned or found["cached"]).values())
        ways = {
            "pseudo-labels": ("adapt", [run["pseudo-labelled"] for run in recipe[setting].values()]),
            f"{FINALIST}{', blocks tuned' if tuned else ''}": ("adapt_images", runs),
            "icons of other domains + pseudo-labels": (
                "adapt_auxiliary",
                [run["pseudo-labelled"] for run in icons[setting][ICONS].values()],
            ),
        }
        for way, (page_, runs) in ways.items():
            yield from _ways_retrieval(f"{labels}, {way}", runs, asked, page_)


def _ways_retrieval(
    said: str, runs: list[dict[str, Any]], asked: tuple[float, float], page_: str
) -> Iterator[Aim]:
    score, viewed = (
        {
            track: statistics.mean(run["map10"][track][view] for run in runs)
            for track in (*NAMES, "unseen", f"{NAMES[1]}-keywords")
        }
        for view in (0, 1)
    )
    seen, never = (score[track] for track in NAMES)
    seen_v, never_v = (viewed[track] for track in NAMES)
    gap, gap_v = (
        "the same, pictures never seen: how far below",
        "that, each picture by the mean of four views",
    )
    for what, value, extra, reach, beyond, less in (
        ("names, pictures seen unlabelled", seen, "", *asked, False),
        (gap, seen - never, f" ({never:.3f})", NEAR, None, True),
        (gap_v, seen_v - never_v, f" ({never_v:.3f})", NEAR, None, True),
        ("keywords, pictures never seen", score[f"{NAMES[1]}-keywords"], "", None, None, False),
        ("names of concepts never seen (gallery of 165)", score["unseen"], "", 0.45, 0.55, False),
        ("those, each picture by the mean of four views", viewed["unseen"], "", 0.45, 0.55, False),
    ):
        yield Aim(
            what=f"{what}; {said}",
            measured=f"{value:.3f}{extra}",
            value=round(value, 3),
            reach=reach,
            beyond=beyond,
            page=page_,
            less=less,
        )


def _student_names(recipe: str, found: dict[str, Any]) -> Iterator[Aim]:
    """Yield what the student of a recipe reaches: what a device would run."""
    scores = {row["track"]: row["student"]["value"] for row in found["tracks"]}
    seen, never = (scores[name] for name in NAMES)
    said = f"; labels of four styles, the student of recipe {recipe}"
    yield Aim(
        what=f"names, pictures seen unlabelled{said}",
        measured=f"{seen:.3f}",
        value=round(seen, 3),
        reach=0.75,
        beyond=0.85,
        page=f"build_{recipe}",
    )
    yield Aim(
        what=f"the same, pictures never seen: how far below{said}",
        measured=f"{seen - never:.3f} ({never:.3f})",
        value=round(seen - never, 3),
        reach=NEAR,
        page=f"build_{recipe}",
        less=True,
    )
    yield Aim(
        what=f"names of concepts never seen (gallery of 165){said}",
        measured=f"{scores['unseen']:.3f}",
        value=round(scores["unseen"], 3),
        reach=0.45,
        beyond=0.55,
        page=f"build_{recipe}",
    )


def _tuning(found: dict[str, Any]) -> Iterator[Aim]:
    """Yield LoRA on all blocks, and where the blocks before it are kept, against full fine-tuning."""
    full = found["map10"][FULL]

    def metric(way: str) -> float:
        """Return the metric against full's, over the seeds that both ran."""
        own = found["map10"][way]
        both = [seed for seed in own if seed in full]
        mine, whole = (sum(runs[seed][track][0] for seed in both for track in NAMES) for runs in (own, full))
        return float(mine / whole)

    for way in LORA:
        step = found["steps"][way]
        for what, value, reach, beyond, less, unit in (
            ("faster than full fine-tuning a step", step["speedup"], 1.4, 3.0, False, "x"),
            ("memory of full fine-tuning's", step["memory_ratio"], 0.45, None, True, "x"),
            ("metric of full fine-tuning's", metric(way), 0.995, None, False, ""),
            ("trained parameters", 100 * step["share"], 1.0, None, True, " %"),
        ):
            digits = 3 if what.startswith("metric") else 2
            yield Aim(
                what=f"{way}: {what}",
                measured=f"{value:.{digits}f}",
                value=round(value, digits),
                reach=reach,
                beyond=beyond,
                page="adapt_tuning",
                unit=unit,
                less=less,
            )


def _student(found: dict[str, Any], recipe: str, page_: str) -> Iterator[Aim]:
    pool = found["pools"]["all names"]
    yield Aim(
        what=f"recipe {recipe}: student / teacher, mAP@10 of all names",
        measured=f"{pool['value']:.3f} ({pool['low']:.3f} to {pool['high']:.3f})",
        value=pool["value"],
        reach=0.98,
        beyond=1.0,
        page=page_,
    )
    weights = {
        who: sum(tower["parameters"] for tower in towers.values()) for who, towers in found["towers"].items()
    }
    fewer = weights["teacher"] / weights["student"]
    yield Aim(
        what=f"recipe {recipe}, student: fewer parameters",
        measured=f"{fewer:.2f}",
        value=fewer,
        reach=8.0,
        page=page_,
        unit="x",
    )


def _faster(times: dict[str, Any], variant: str, recipe: str, page_: str) -> Iterator[Aim]:
    """Yield how many times faster than the teacher, on a CPU."""
    for batch in ("1", "8"):
        teacher, student = (
            sum(times[who][tower][batch] for tower in ("image", "text")) for who in ("teacher", variant)
        )
        yield Aim(
            what=f"recipe {recipe}, student: faster, image and text, batch {batch}, {variant.upper()} in "
            "ONNX Runtime, CPU",
            measured=f"{teacher / student:.2f}",
            value=teacher / student,
            reach=10.0,
            page=page_,
            unit="x",
        )


def _controls(found: dict[str, Any]) -> Iterator[Aim]:
    """Yield what the recipe's losses have over each control, over the mean of all six tracks."""
    runs = found["runs"]
    ours = next(name for name in runs if name.startswith("ours: "))
    for control in (name for name in runs if name.startswith(("no KD", "CLIP-KD"))):
        seeds = sorted(set(runs[ours]) & set(runs[control]))
        points = [
            100 * (_six(runs[ours][seed]["map10"]) - _six(runs[control][seed]["map10"])) for seed in seeds
        ]
        value = statistics.mean(points)
        yield Aim(
            what=f"student of equal steps over '{control}', {len(seeds)} seeds, mean of six tracks",
            measured=f"{value:+.1f}",
            value=value,
            reach=0.0,
            beyond=2.0,
            page="distil",
            unit=" points",
        )


def _six(map10: dict[str, float]) -> float:
    return statistics.mean(map10.values())


def page(folder: Path) -> str:
    """Return the whole page."""
    lines = [
        "# Adapting and distilling: what was aimed at",
        "",
        "Made by `scripts/bench/transfer_aims.py` out of the figures of the pages that are named; each "
        "of them has its command, commit and machine. mAP@10 of the plain view where no other is named; with "
        "one relevant image a query, it equals MRR@10. Where something was tried for a row that is missed, "
        "its page says so.",
        "",
        "| what | measured | reach | beyond | | page |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for aim in aims(folder):
        sign = "at most " if aim.less else ""
        asked = ["" if value is None else f"{sign}{value:g}{aim.unit}" for value in (aim.reach, aim.beyond)]
        lines.append(
            f"| {aim.what} | {aim.measured}{aim.unit} | {' | '.join(asked)} | {aim.verdict} "
            f"| [{aim.page}]({aim.page}.md) |"
        )
    return "\n".join([*lines, ""])


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text("utf-8"))
    return found


if __name__ == "__main__":
    (OUT / "transfer_aims.md").write_text(page(OUT), "utf-8")
