"""The student that a budget chooses: the most accurate one of a search that meets it.

Whether any student can meet it is asked of the smallest one, before a teacher is trained for hours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from edgeglm.build.pipeline import plan_build
from edgeglm.build.stage_memory import run_stage
from edgeglm.build.student_budget import Asked, Budget
from edgeglm.build.student_costs import Cost, CostMaker, Peaks, judged_by, peaks_of
from edgeglm.build.student_search import (
    STEPS,
    Search,
    SearchConfig,
    StudentSearchStage,
    Tried,
    read_search,
    smallest_size,
)
from edgeglm.build.suited import require_suited
from edgeglm.build.untrained import fewer_entries
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import Recipe, StudentConfig
from edgeglm.core.stage import Context, Inputs, Stage, StageResult
from edgeglm.targets.schema import Target

C = TypeVar("C", bound=Cost)
_COST_NAME = "cost.json"
#: What neither a search nor a cost reads: a change of it searches nothing anew.
_UNREAD = (
    "size",
    "checkpoint_epochs",
    "image_epochs",
    "text_epochs",
    "caption_repeats",
    "views",
    "image_target",
    "patience",
    "corpus",
    "losses",
)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A recipe with the student that a budget chose, the search it was chosen in, and where that is kept.

    ``asked`` is what the search was asked for.
    """

    recipe: Recipe
    chosen: Tried
    search: Search
    artifact: Artifact
    asked: Asked


class SmallestConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the cost of the smallest student."""

    student: StudentConfig
    resolution: int
    embedding_dim: int
    opset: int
    text_teacher: str
    teacher_vocabulary: int
    boards: tuple[Peaks, ...]


class SmallestStudentStage(Stage[SmallestConfig]):
    """``cost.json``: the :class:`Cost` of the smallest student of the search's space."""

    name = "smallest-student"
    code: ClassVar[tuple[str, ...]] = (*StudentSearchStage.code, "edgeglm.build.student_choice")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime-gpu")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Export it untrained and time it."""
        from edgeglm.adapt.text_teacher import load_text_teacher

        config = self.config
        with context.store.scratch() as folder, context.progress.task("Student: the smallest"):
            text = load_text_teacher(
                config.text_teacher, inputs["text"], folder / "text", max_length=config.student.max_length
            )
            whole = text.tokenizer.vocabulary_size
            maker = CostMaker(
                folder,
                config.student,
                embedding_dim=config.embedding_dim,
                opset=config.opset,
                boards=config.boards,
                vocabulary=fewer_entries(whole, config.teacher_vocabulary, config.student.vocabulary),
                context=context,
            )
            maker.cost(smallest_size(), config.resolution)
            (cost,) = maker.timed()
        (out / _COST_NAME).write_bytes(msgspec.json.encode(cost))
        return {"cost": msgspec.to_builtins(cost)}


def searched_recipe(
    recipe: Recipe,
    target: Target,
    budget: Budget,
    context: Context,
    *,
    trials: int,
    resolution: int | None = None,
    on_stage: Callable[[StageResult], None] = lambda _: None,
) -> Choice:
    """Search (or take what the store has) and set the size and resolution of the recipe's student.

    The stages up to the teacher's cached words are those of the build, which reuses them.

    Args:
        recipe: Its ``student.size`` does not count.
        target: Whose floor latency is held against; without known peaks it is measured here.
        budget: What the student may cost.
        context: Store, progress, threads.
        trials: How many shapes are proposed.
        resolution: The only side of images to consider; by default three about the recipe's.
        on_stage: Told of each stage when it is done.

    Raises:
        UserError: No student meets the budget; it names the nearest.
    """
    recipe = undecided(recipe)
    boards, student = peaks_of(target), recipe.student
    about = resolutions_about(student.resolution, recipe.data.image_size)
    sides = about if resolution is None else (resolution,)
    plan = plan_build(recipe, target, context.store, context.progress)
    smallest = SmallestStudentStage(
        SmallestConfig(
            student=StudentConfig(max_length=student.max_length, vocabulary=student.vocabulary),
            resolution=sides[0],
            embedding_dim=recipe.teacher.embedding_dim,
            opset=recipe.export.opset,
            text_teacher=recipe.teacher.text,
            teacher_vocabulary=recipe.teacher.vocabulary,
            boards=boards,
        )
    )
    cost = smallest({"text": plan.sources["teacher:text"]}, context).artifact
    within([msgspec.json.decode((cost.path / _COST_NAME).read_bytes(), type=Cost)], budget, judged_by(boards))
    made: dict[str, Artifact] = {}
    for node in plan.nodes:
        if node.name == "teacher-evaluation":
            continue
        inputs = plan.inputs_of(node, made)
        assert inputs is not None, node.name
        result = run_stage(node.stage, inputs, context)
        made[node.name] = result.artifact
        on_stage(result)
        if node.name == "pairs":
            require_suited(recipe, result.artifact, plan.sources, context)
        if node.name == "targets":
            break
    config = SearchConfig(
        student=_by_default(student, _UNREAD),
        embedding_dim=recipe.teacher.embedding_dim,
        resolutions=sides,
        trials=trials,
        steps=STEPS,
        seed=recipe.seed,
        opset=recipe.export.opset,
        boards=boards,
    )
    taken = {name: made[name] for name in ("pairs", "teacher", "targets")}
    if inherited := plan.sources.get("student:inherit"):
        taken["inherit"] = inherited
    result = run_stage(StudentSearchStage(config), taken, context)
    on_stage(result)
    search = read_search(result.artifact)
    chosen = chosen_student(search, budget)
    changed = msgspec.structs.replace(student, size=chosen.size, resolution=chosen.resolution)
    return Choice(
        recipe=msgspec.structs.replace(recipe, student=changed),
        chosen=chosen,
        search=search,
        artifact=result.artifact,
        asked=Asked(
            budget=budget, trials=trials, resolution=student.resolution, fixed=resolution is not None
        ),
    )


def undecided(recipe: Recipe) -> Recipe:
    """Return the recipe with a size that suits any teacher: a budget chooses, so its own forbids nothing."""
    return msgspec.structs.replace(recipe, student=_by_default(recipe.student, ("size",)))


def _by_default(student: StudentConfig, names: Sequence[str]) -> StudentConfig:
    defaults = StudentConfig()
    return msgspec.structs.replace(student, **{name: getattr(defaults, name) for name in names})


def resolutions_about(resolution: int, kept: int | None = None) -> tuple[int, ...]:
    """Return three sides of images to choose from: three quarters, the recipe's own, one and a half.

    Pictures of which training keeps ``kept`` pixels a side have no more to show: a larger side than these and
    the recipe's is left out.
    """
    sides = {max(8, resolution * 3 // 4), resolution, resolution * 3 // 2}
    return tuple(sorted(side for side in sides if kept is None or side <= max(resolution, kept)))


def chosen_student(search: Search, budget: Budget) -> Tried:
    """Return the most accurate student within the budget; of equal ones the faster.

    Raises:
        UserError: None meets it; it names the nearest.
    """
    found = within(search.students, budget, search.judged)
    return max(found, key=lambda one: (one.map10, -one.judged_ms, -one.file_bytes))


def within(costs: Sequence[C], budget: Budget, judged: str) -> list[C]:
    """Return those that meet the budget. Raises UserError that names the nearest if none does."""
    found = [cost for cost in costs if budget.excess(cost) <= 1]
    if found:
        return found
    nearest = min(costs, key=budget.excess)
    raise UserError(
        f"no student meets the budget ({budget}): the nearest is {nearest.size} at {nearest.resolution} "
        f"pixels with {_upward(nearest.judged_ms)} ms for an image and a text ({judged}) and "
        f"{_upward(nearest.file_bytes / 1e6)} MB; raise the budget to that, or lower student.resolution"
    )


def _upward(value: float) -> str:
    """Write a positive number to three figures, never below it: who asks for what is written gets it."""
    figure = Decimal(1).scaleb(Decimal(value).adjusted() - 2)
    return format(Decimal(value).quantize(figure, ROUND_CEILING).normalize(), "f")
