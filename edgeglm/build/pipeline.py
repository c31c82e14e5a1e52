"""The pipeline as data: which stages a recipe and a target ask for, and what each takes from which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgeglm.adapt.image_tuning_stage import require_tunable
from edgeglm.adapt.targets import require_heirs_teacher
from edgeglm.build.evaluations import EvaluationConfig, ExportEvaluation, StudentEvaluation
from edgeglm.build.export_stage import ExportStage, ExportStageConfig
from edgeglm.build.latency_stage import LatencyConfig, LatencyStage
from edgeglm.build.nodes import Node
from edgeglm.build.pack_stage import PackStage, PackStageConfig
from edgeglm.build.quantize_stage import QuantizeStage, quantize_config
from edgeglm.build.reranker_stage import (
    RerankerEvaluation,
    RerankerEvaluationConfig,
    RerankerStage,
    RerankerStageConfig,
)
from edgeglm.build.sources import TEXT, Needs, sources_of, teacher_rooms
from edgeglm.build.student_budget import Asked
from edgeglm.build.teacher_nodes import backbones_of, teacher_nodes
from edgeglm.build.unheard import require_elsewhere, require_heard
from edgeglm.compile.decision import require_options
from edgeglm.compile.stage import CompileStage, compile_config
from edgeglm.core.artifact import Artifact
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import Recipe
from edgeglm.core.store import Store
from edgeglm.distill.stages import (
    ImageStudentStage,
    TargetsConfig,
    TargetsStage,
    TextStudentStage,
    student_assets,
)
from edgeglm.distill.student_stage import StudentStageConfig
from edgeglm.distill.together import ImagePartStage, TogetherStage
from edgeglm.models.student_shapes import student_shape
from edgeglm.targets.legality import legal_precisions
from edgeglm.targets.schema import Target, resolve_target

SEARCH = "data:student-search"
#: What sources are for, as their names begin.
ROOMS = ("data", "teacher", "student", "reading", "auxiliary")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a build will do, in order.

    ``sources`` are fetched artifacts by name, ``absent`` the assets that a plan made without downloads
    would still have to fetch.
    """

    recipe: Recipe
    target: Target
    nodes: tuple[Node, ...]
    sources: Mapping[str, Artifact]
    absent: Mapping[str, str] = field(default_factory=dict)

    def inputs_of(self, node: Node, made: Mapping[str, Artifact]) -> dict[str, Artifact] | None:
        """Return the inputs of a node from what is made; None if an earlier stage is missing."""
        return node.inputs({**self.sources, **made})


def plan_build(
    recipe: Recipe,
    target: Target,
    store: Store,
    progress: Progress,
    *,
    search: Artifact | None = None,
    asked: Asked | None = None,
    download: bool = True,
) -> Plan:
    """Fetch the sources of a recipe and lay out its stages. Raises UserError for what cannot work.

    ``search`` is what a student within a budget was chosen in, ``asked`` what it was asked for; bundle and
    report show both. Without ``download`` the plan holds only the sources that are here: it can be explained,
    not built.
    """
    _require_consistent(recipe, target)
    rooms = {**teacher_rooms(recipe), "student": student_assets(recipe.student)}
    sources = sources_of(recipe, rooms, store, progress, download=download)
    if TEXT in sources.found:
        require_heirs_teacher(recipe.student.size, recipe.teacher.text, sources.found[TEXT])
    found = {**sources.found, **({} if search is None else {SEARCH: search})}
    nodes = _nodes(recipe, target, candidate_precisions(recipe, target), sources.needs, found, asked)
    return Plan(recipe=recipe, target=target, nodes=nodes, sources=found, absent=sources.absent)


def stage_names(recipe: Recipe, target: Target) -> list[str]:
    """Return the names of the stages in order, fetching nothing."""
    _require_consistent(recipe, target)
    empty: dict[str, dict[str, str]] = {room: {} for room in ROOMS}
    return [node.name for node in _nodes(recipe, target, candidate_precisions(recipe, target), empty, {})]


def candidate_precisions(recipe: Recipe, target: Target) -> tuple[Literal["fp16", "int8"], ...]:
    """Return the recipe's candidates that are legal on the target."""
    legal = legal_precisions(target)
    return tuple(name for name in recipe.quantize.candidates if name in legal)


def _require_consistent(recipe: Recipe, target: Target) -> None:
    """Raise UserError for a recipe that cannot work, whatever its files hold: before any is fetched."""
    require_heard(recipe)
    require_tunable(recipe.teacher)
    require_elsewhere(recipe.teacher.auxiliary.icons, recipe.data)
    require_options(resolve_target(target, recipe.engine))


def _nodes(
    recipe: Recipe,
    target: Target,
    candidates: tuple[Literal["fp16", "int8"], ...],
    needs: Needs,
    sources: Mapping[str, Artifact],
    asked: Asked | None = None,
) -> tuple[Node, ...]:
    upstream = tuple(_upstream(recipe, target, candidates, needs))
    return (*upstream, _pack_node(recipe, target, sources, upstream, asked))


def _upstream(
    recipe: Recipe,
    target: Target,
    candidates: tuple[Literal["fp16", "int8"], ...],
    needs: Needs,
) -> Iterator[Node]:
    teacher, student, seed = recipe.teacher, recipe.student, recipe.seed
    evaluation = EvaluationConfig(seed=seed, size=student.size, resolution=student.resolution)
    towers = {"distil-image": "distil-image", "distil-text": "distil-text", "teacher": "teacher"}
    yield from teacher_nodes(recipe, needs)
    yield Node(
        stage=TargetsStage(TargetsConfig(corpus=student.corpus, seed=seed)),
        needs={"pairs": "pairs", "teacher": "teacher"},
    )
    cached = {"pairs": "pairs", "teacher": "teacher", "targets": "targets"}
    inherits = student_shape(student.size).heir
    heir = {"text": TEXT} if inherits else {}
    text = teacher.text if inherits else ""
    if any(student.losses.weights().values()):
        both = StudentStageConfig(student=student, seed=seed, view_seed=seed, teacher=text)
        yield Node(stage=TogetherStage(both), needs={**cached, **heir, **needs["student"]})
        yield Node(stage=ImagePartStage(both), needs={"distil-text": "distil-text"})
    else:
        one = StudentStageConfig.of("text", student, seed=seed, teacher=text)
        yield Node(stage=TextStudentStage(one), needs={**cached, **heir})
        yield Node(
            stage=ImageStudentStage(StudentStageConfig.of("image", student, seed=seed)),
            needs={**cached, **needs["student"]},
        )
    yield Node(stage=StudentEvaluation(evaluation), needs={"pairs": "pairs", **towers})
    exporting = ExportStageConfig(
        export=recipe.export, size=student.size, resolution=student.resolution, margin=recipe.data.margin
    )
    yield Node(stage=ExportStage(exporting), needs=towers)
    yield Node(
        stage=ExportEvaluation(EvaluationConfig(seed=seed)), needs={"pairs": "pairs", "export": "export"}
    )
    if recipe.reranker.enabled:
        fused = RerankerStageConfig(
            reranker=recipe.reranker,
            export=recipe.export,
            size=student.size,
            resolution=student.resolution,
            seed=seed,
        )
        yield Node(
            stage=RerankerStage(fused),
            needs={"pairs": "pairs", "targets": "targets", "export": "export", **towers},
        )
        yield Node(
            stage=RerankerEvaluation(RerankerEvaluationConfig(seed=seed)),
            needs={"pairs": "pairs", "export": "export", "reranker": "reranker"},
        )
    quantizing = quantize_config(recipe, target, candidates)
    yield Node(
        stage=QuantizeStage(quantizing),
        needs={
            **{name: name for name in ("pairs", "export", "targets")},
            **({} if quantizing.tuning is None else towers),
        },
    )
    models = {"quantize": "quantize", "export": "export"}
    yield Node(
        stage=LatencyStage(LatencyConfig()),
        needs={**models, "teacher": "teacher", "backbones": backbones_of(recipe)},
    )
    yield Node(
        stage=CompileStage(compile_config(target, max_length=student.max_length, engine=recipe.engine)),
        needs={"quantize": "quantize"},
        per_target=True,
    )


def _pack_node(
    recipe: Recipe,
    target: Target,
    sources: Mapping[str, Artifact],
    upstream: Sequence[Node],
    asked: Asked | None,
) -> Node:
    """Return the last node. It takes every stage before it, so that the bundle tells where it came from."""
    shown = {"student-search": SEARCH} if SEARCH in sources else {}
    return Node(
        stage=PackStage(PackStageConfig.of(recipe, target, sources, asked)),
        needs={**{node.name: node.name for node in upstream}, **shown},
        per_target=True,
    )
