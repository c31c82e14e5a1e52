"""A search over shapes of students: what each is worth after a short training, and what it costs.

Optuna (Akiba et al., 2019) proposes shapes by its multi-objective TPE (Ozaki et al., 2022), seeded: more
accuracy, less latency, smaller files. What guides it is the same at every run: latency counts as the target's
floor where its peaks are known, else as operations. Afterwards all students are timed here, in turn.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import msgspec

from edgeglm.build.student_costs import Cost, CostMaker, Peaks, judged_by
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import StudentConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.distill.student_stage import CODE as STUDENT_CODE
from edgeglm.evaluate.retrieval import UnusableEmbeddingsError
from edgeglm.models.student_shapes import FAMILY, spelled, student_shape

_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
TRIALS, LEAST_TRIALS = 12, 4
STEPS = 150
FILE_NAME = "student_search.json"
#: What a shape is made of; each list ascends, so that its first entries are the smallest student.
SPACE: dict[str, tuple[int, ...]] = {
    "blocks": (6, 8, 11, 15),
    "channels": (32, 48, 64, 96),
    "factor": (32, 48, 64, 96),
    "width": (96, 128, 160, 256),
    "layers": (1, 2, 3),
}


class SearchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides a search.

    Attributes:
        student: The recipe's; its size does not count.
        embedding_dim: D.
        resolutions: Sides of images to choose from, ascending.
        trials: How many shapes are proposed.
        steps: Of each tower's short training.
        seed: Of the proposals, the trainings and the images held back.
        opset: Of the exported files.
        boards: The target's boards, where all their peaks are known; else none.
    """

    student: StudentConfig
    embedding_dim: int
    resolutions: tuple[int, ...]
    trials: int
    steps: int
    seed: int
    opset: int
    boards: tuple[Peaks, ...] = ()


class Tried(Cost, frozen=True, kw_only=True):
    """A student of the search: its cost, and the mAP@10 of its short training. On the front nothing beats it.

    Attributes:
        map10: Of names asked of images held back from training: good for comparing, no forecast.
        front: Whether no other is as good, as fast and as small, and better in one of them.
    """

    map10: float
    front: bool = False


class Search(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``student_search.json``: what was tried, how it was judged, and what the teacher reaches there.

    ``diverged`` are the students, as ``size resolution``, whose short training came to no number.
    """

    judged: str
    trials: int
    steps: int
    seed: int
    queries: int
    teacher_map10: float
    students: tuple[Tried, ...]
    diverged: tuple[str, ...] = ()


class Estimating(Protocol):
    """What says how good a student is."""

    def map10(self, size: str, resolution: int) -> float:
        """Return its mAP@10 after a short training. Raises DivergedError or UnusableEmbeddingsError."""


class Costed(Protocol):
    """What says how much a student costs."""

    def cost(self, size: str, resolution: int) -> Cost:
        """Return its cost; the time here does not count yet."""


class StudentSearchStage(Stage[SearchConfig]):
    """Searches on the cached targets. A budget is no part of it: another budget costs no search."""

    name = "student-search"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.build.student_costs",
        "edgeglm.build.student_search",
        "edgeglm.build.untrained",
        *STUDENT_CODE,
        "edgeglm.data.tokenization",
        "edgeglm.data.transforms",
        "edgeglm.evaluate.retrieval",
        "edgeglm.export",
        "edgeglm.targets.roofline",
        "edgeglm.engines.timing",
        "edgeglm.engines.onnxruntime_engine",
    )
    libraries: ClassVar[tuple[str, ...]] = ("optuna", "torch", "onnx", "onnxscript", "onnxruntime-gpu")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Try shapes, then time all of them in turn."""
        from edgeglm.distill.estimate import Estimator

        config = self.config
        kept = context.store.checkpoints / self.key(inputs) / "trials.json"
        with context.store.scratch() as folder:
            estimator = Estimator(
                inputs, config.student, steps=config.steps, seed=config.seed, scratch=folder, context=context
            )
            maker = CostMaker(
                folder,
                config.student,
                embedding_dim=config.embedding_dim,
                opset=config.opset,
                boards=config.boards,
                vocabulary=estimator.vocabulary,
                context=context,
            )
            found = proposals(config, estimator, maker, kept, context)
            students = on_front(
                [
                    Tried(**{**msgspec.to_builtins(cost), "map10": found[cost.size, cost.resolution]})
                    for cost in maker.timed()
                    if found[cost.size, cost.resolution] is not None
                ]
            )
            if not students:
                raise UserError(
                    "the short training of every student of the search diverged; "
                    "lower student.image_learning_rate and student.text_learning_rate"
                )
            search = Search(
                judged=judged_by(config.boards),
                trials=config.trials,
                steps=config.steps,
                seed=config.seed,
                queries=estimator.queries,
                teacher_map10=round(estimator.teacher_map10(), 6),
                students=students,
                diverged=tuple(f"{size} {side}" for (size, side), value in found.items() if value is None),
            )
        (out / FILE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(search), indent=1))
        shutil.rmtree(kept.parent, ignore_errors=True)
        return {"students": len(students), "front": [s.size for s in students if s.front]}


def read_search(artifact: Artifact) -> Search:
    """Read what the stage wrote."""
    return msgspec.json.decode((artifact.path / FILE_NAME).read_bytes(), type=Search)


def on_front(students: Sequence[Tried]) -> tuple[Tried, ...]:
    """Mark those that no other one beats, and return all, ascending in latency."""

    def beats(one: Tried, other: Tried) -> bool:
        ours = (-one.map10, one.judged_ms, one.file_bytes)
        theirs = (-other.map10, other.judged_ms, other.file_bytes)
        return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))

    marked = [
        msgspec.structs.replace(one, front=not any(beats(other, one) for other in students))
        for one in students
    ]
    return tuple(sorted(marked, key=lambda one: (one.judged_ms, one.size, one.resolution)))


def smallest_size() -> str:
    """Return the smallest shape of the space."""
    return spelled(**{name: values[0] for name, values in SPACE.items()})


def proposals(
    config: SearchConfig, estimator: Estimating, maker: Costed, kept: Path, context: Context
) -> dict[tuple[str, int], float | None]:
    """Let Optuna propose shapes; return the mAP@10 of each, None for one whose training diverged.

    What ``kept`` has is not trained again; a damaged ``kept`` is set aside.
    """
    import optuna

    from edgeglm.train.loop import DivergedError

    before = _kept_trials(kept)
    found: dict[tuple[str, int], float | None] = {}
    space = {**SPACE, "resolution": config.resolutions}
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns of each that diverged
    sampler = optuna.samplers.TPESampler(
        seed=config.seed, n_startup_trials=max(LEAST_TRIALS, config.trials // 2)
    )
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    for first in _first(config):
        study.enqueue_trial(first)
    with context.progress.task("Student: search", total=config.trials) as task:

        def objective(trial: optuna.Trial) -> tuple[float, float, float]:
            drawn = {
                name: values[trial.suggest_int(name, 0, len(values) - 1)] for name, values in space.items()
            }
            side = drawn.pop("resolution")
            size = spelled(**drawn)
            cost = maker.cost(size, side)
            name = f"{size} {side}"
            if name not in before:
                try:
                    before[name] = round(estimator.map10(size, side), 6)
                except (DivergedError, UnusableEmbeddingsError):
                    before[name] = None
                kept.parent.mkdir(parents=True, exist_ok=True)
                beside = kept.with_suffix(".new")
                beside.write_text(json.dumps(before))
                beside.replace(kept)
            found[size, side] = value = before[name]
            task.note(f"{name}: {'diverged' if value is None else f'{value:.3f}'}")
            task.advance()
            guide = cost.flops / 1e9 if cost.floor_ms is None else cost.floor_ms
            return math.nan if value is None else value, guide, float(cost.file_bytes)

        study.optimize(objective, n_trials=config.trials)
    return found


def _kept_trials(kept: Path) -> dict[str, float | None]:
    """Read what an earlier run of the search found; a file that nobody can read is set aside."""
    if not kept.exists():
        return {}
    try:
        return msgspec.json.decode(kept.read_bytes(), type=dict[str, _Share | None])
    except msgspec.DecodeError:
        kept.replace(kept.with_suffix(".damaged"))
        return {}


def _first(config: SearchConfig) -> list[dict[str, int]]:
    """Return where the search begins: the smallest student, and the named ones at the recipe's resolution."""
    side = config.resolutions.index(config.student.resolution)
    found = [dict.fromkeys((*SPACE, "resolution"), 0)]
    for name in FAMILY:
        shape = student_shape(name)
        places = {key: values.index(getattr(shape, key)) for key, values in SPACE.items()}
        found.append({**places, "resolution": side})
    return found
