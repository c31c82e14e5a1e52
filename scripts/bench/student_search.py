"""The search for a student within a budget, and whether its short trainings rank students rightly.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/student_search.py [--trials 12] [--long 1000]

STORE is one in which the recipe `default` was built. The search is the stage that `edgeglm build
--latency-budget` runs. Then some of its students, evenly spread over what it found, are trained for more
steps, the same way, and the two orders compared (Spearman). Writes docs/bench/student_search.json and .md.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from bench_store import ROOT, bench_parser, newest, origin

from edgeglm.build.shipped import load_recipe
from edgeglm.build.student_budget import Budget
from edgeglm.build.student_choice import chosen_student, resolutions_about
from edgeglm.build.student_costs import peaks_of
from edgeglm.build.student_search import STEPS, Search, SearchConfig, StudentSearchStage, read_search
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.stage import Context
from edgeglm.core.store import Store
from edgeglm.distill.estimate import Estimator
from edgeglm.distill.stages import student_inputs
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE
from edgeglm.targets.schema import load_target

OUT = ROOT / "docs" / "bench" / "student_search"
BUDGETS = (0.5, 1.0, 1.5, 2.0, 4.0)


def main() -> None:
    """Search, check, write."""
    parser = bench_parser(__doc__)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--long", type=int, default=1000, help="steps of the longer training")
    parser.add_argument("--check", type=int, default=6, help="students to train for longer")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    store = Store(Path(os.environ["EDGEGLM_STORE"]))
    context = Context(store=store, progress=QuietProgress(), threads=options.threads)
    recipe = load_recipe("default", ())
    config = SearchConfig(
        student=msgspec.structs.replace(recipe.student, checkpoint_epochs=0),
        embedding_dim=recipe.teacher.embedding_dim,
        resolutions=resolutions_about(recipe.student.resolution),
        trials=options.trials,
        steps=STEPS,
        seed=recipe.seed,
        opset=recipe.export.opset,
        boards=peaks_of(load_target(options.target)),
    )
    inputs = {kind: newest(store, kind) for kind in ("pairs", "teacher", "targets")}
    inputs |= student_inputs(recipe.student, store, QuietProgress())
    started = time.process_time()
    result = StudentSearchStage(config)(inputs, context)
    seconds = None if result.reused else round(time.process_time() - started, 1)
    search = read_search(result.artifact)
    ranked = sorted(search.students, key=lambda one: one.map10)
    places = np.unique(np.linspace(0, len(ranked) - 1, min(options.check, len(ranked))).round().astype(int))
    longer: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        long = Estimator(
            inputs,
            config.student,
            steps=options.long,
            seed=config.seed + 1,
            scratch=Path(folder),
            context=context,
        )
        for place in places.tolist():
            one = ranked[place]
            longer[f"{one.size} at {one.resolution}"] = round(long.map10(one.size, one.resolution), 4)
    command = (
        f"scripts/bench/student_search.py --target {options.target} --trials {options.trials} "
        f"--long {options.long} --check {options.check} --threads {options.threads}"
    )
    record = {
        **origin(),
        "command": command,
        "search": msgspec.to_builtins(search),
        "longer_steps": options.long,
        "longer": longer,
        "cpu_seconds": seconds,
    }
    OUT.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(page(record, search))


def spearman(record: dict[str, Any], search: Search) -> float:
    """Return the rank correlation of short and longer trainings."""
    short = {f"{one.size} at {one.resolution}": one.map10 for one in search.students}
    names = list(record["longer"])
    ranks = [np.argsort(np.argsort([table[name] for name in names])) for table in (short, record["longer"])]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def page(record: dict[str, Any], search: Search) -> str:
    """Return the readable table."""
    lines = [
        "# The search for a student within a budget",
        "",
        f"Made by `{record['command']}` at commit {record['commit']} on {record['machine']}.",
        "",
        f"Optuna proposed {search.trials} students, seed {search.seed}; {len(search.students)} of them "
        f"differ. Each tower learnt for {search.steps} steps on cached targets; mAP@10 is over "
        f"{search.queries} names asked of images held back from it, where the teacher, which has learnt "
        f"from them, reaches {search.teacher_map10:.3f}. "
        f"It compares students and forecasts nothing. {ONE_RELEVANT_NOTE} Latency: {search.judged}. "
        "Milliseconds are of an image and a text, all students timed in turn on a machine that others used: "
        "they compare among themselves.",
        "",
        "| student | mAP@10, short | longer | ms here | floor ms | MB | M weights | front |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in search.students:
        longer = record["longer"].get(f"{one.size} at {one.resolution}")
        floor = "-" if one.floor_ms is None else f"{one.floor_ms:.4f}"
        lines.append(
            f"| {one.size} at {one.resolution} px | {one.map10:.3f} | "
            f"{'-' if longer is None else f'{longer:.3f}'} | {one.here_ms:.2f} | {floor} | "
            f"{one.file_bytes / 1e6:.1f} | {one.parameters / 1e6:.2f} | {'yes' if one.front else ''} |"
        )
    lines += ["", "| latency budget | chosen |", "| ---: | --- |"]
    for budget in BUDGETS:
        try:
            chosen = chosen_student(search, Budget(latency_ms=budget))
            said = f"{chosen.size} at {chosen.resolution} px, {chosen.map10:.3f}, {chosen.judged_ms:.3g} ms"
        except UserError as error:
            said = f"refused: {error}"
        lines.append(f"| {budget:g} ms | {said} |")
    cost = record["cpu_seconds"]
    lines += [
        "",
        f"Rank correlation (Spearman) of the short training with one of {record['longer_steps']} steps and "
        f"another seed, which holds other images back, over {len(record['longer'])} students spread over the "
        f"range: **{spearman(record, search):.2f}**."
        + ("" if cost is None else f" The search took {cost:.0f} CPU seconds."),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
