"""What `edgeglm build` says of a budget: the search for the student within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeglm.cli.console import App
from edgeglm.core.errors import UserError
from edgeglm.core.words import human_bytes

if TYPE_CHECKING:
    from edgeglm.build.student_budget import Budget
    from edgeglm.build.student_choice import Choice
    from edgeglm.core.recipe import Recipe
    from edgeglm.targets.schema import Target


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The search that a command line asks for. ``fixed`` keeps the recipe's resolution."""

    budget: Budget
    trials: int
    fixed: bool


def search_of(
    latency: str | None, memory: str | None, trials: int | None, overrides: tuple[str, ...]
) -> Wanted | None:
    """Read the options of a search; None without a budget. Raises UserError."""
    if latency is None and memory is None:
        if trials is not None:
            raise UserError(
                "--trials is of the search within a budget; give --latency-budget or --memory-budget"
            )
        return None
    from edgeglm.build.student_budget import budget_of
    from edgeglm.build.student_search import LEAST_TRIALS, TRIALS

    budget = budget_of(latency, memory)
    assert budget is not None
    if trials is not None and trials < LEAST_TRIALS:
        raise UserError(
            f"a search begins with {LEAST_TRIALS} students; give at least --trials {LEAST_TRIALS}"
        )
    set_here = {override.partition("=")[0].strip() for override in overrides}
    if "student.size" in set_here:
        raise UserError("student.size and a budget both choose the student; leave one of them out")
    return Wanted(budget=budget, trials=trials or TRIALS, fixed="student.resolution" in set_here)


def undecided_recipe(recipe: Recipe, wanted: Wanted | None) -> Recipe:
    """Return the recipe without the student's size where a budget is to choose it."""
    from edgeglm.build.student_choice import undecided

    return recipe if wanted is None else undecided(recipe)


def searched(app: App, recipe: Recipe, target: Target, wanted: Wanted, threads: int) -> Choice:
    """Search for the student within a budget and show what it was chosen among."""
    from edgeglm.build.student_choice import searched_recipe
    from edgeglm.core.stage import Context

    found = searched_recipe(
        recipe,
        target,
        wanted.budget,
        Context(store=app.store(), progress=app.progress, threads=threads),
        trials=wanted.trials,
        resolution=recipe.student.resolution if wanted.fixed else None,
    )
    rows = [
        (
            f"{one.size} at {one.resolution}{' *' if one is found.chosen else ''}",
            f"{one.map10:.3f}",
            "-" if one.floor_ms is None else f"{one.floor_ms:.4f}",
            f"{one.here_ms:.2f}",
            human_bytes(one.file_bytes),
            f"{one.parameters / 1e6:.2f} M",
            "front" if one.front else "",
            "yes" if wanted.budget.excess(one) <= 1 else "no",
        )
        for one in found.search.students
    ]
    app.table(
        ("student", ">mAP@10", ">floor ms", ">ms here", ">FP32 files", ">weights", "Pareto", "within"),
        rows,
        title=f"{found.search.steps} steps each, {found.search.queries} names; * is built",
    )
    if found.search.diverged:
        app.print(f"training diverged, so not counted: {', '.join(found.search.diverged)}")
    app.print(f"latency is judged as {found.search.judged}")
    return found
