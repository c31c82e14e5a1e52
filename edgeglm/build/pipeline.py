"""The pipeline as data: which stages a recipe and a target ask for, and what each takes from which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeglm.adapt.image_tuning_stage import ImageTuningStage, TunedFeaturesStage, require_tunable
from edgeglm.adapt.pretraining_stage import PretrainingStage, pretraining_assets, pretraining_files
from edgeglm.adapt.stages import (
    AuxiliaryFeaturesStage,
    BackbonesConfig,
    BackbonesStage,
    FeaturesConfig,
    FeaturesStage,
    TeacherStage,
    teacher_assets,
)
from edgeglm.adapt.targets import require_heirs_teacher, require_targets
from edgeglm.assets.fetch import fetch_asset, is_fetched
from edgeglm.build.evaluations import (
    EvaluationConfig,
    ExportEvaluation,
    StudentEvaluation,
    TeacherEvaluation,
)
from edgeglm.build.export_stage import ExportStage, ExportStageConfig
from edgeglm.build.latency_stage import LatencyConfig, LatencyStage
from edgeglm.build.pack_stage import PackStage, PackStageConfig
from edgeglm.build.quantize_stage import QuantizeStage, quantize_config
from edgeglm.build.reranker_stage import (
    RerankerEvaluation,
    RerankerEvaluationConfig,
    RerankerStage,
    RerankerStageConfig,
)
from edgeglm.build.unheard import require_elsewhere, require_heard
from edgeglm.compile.decision import require_options
from edgeglm.compile.stage import CompileStage, compile_config
from edgeglm.core.artifact import Artifact
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import Recipe
from edgeglm.core.stage import Stage
from edgeglm.core.store import Store
from edgeglm.data.auxiliary import AuxiliaryPairsConfig, AuxiliaryPairsStage, auxiliary_assets
from edgeglm.data.sources import pairs_assets, pairs_inputs, pairs_stage
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
class Node:
    """One stage of a plan. ``needs`` maps the names of its inputs to earlier stages or sources.

    ``per_target`` says whether the target is part of its key, and so of its place in the history.
    """

    stage: Stage[Any]
    needs: Mapping[str, str]
    per_target: bool = False

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


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
        known = {**self.sources, **made}
        if any(origin not in known for origin in node.needs.values()):
            return None
        return {name: known[origin] for name, origin in node.needs.items()}


def plan_build(
    recipe: Recipe,
    target: Target,
    store: Store,
    progress: Progress,
    *,
    search: Artifact | None = None,
    download: bool = True,
) -> Plan:
    """Fetch the sources of a recipe and lay out its stages. Raises UserError for what cannot work.

    ``search`` is what a student within a budget was chosen in; bundle and report show it. Without
    ``download`` the plan holds only the sources that are here: it can be explained, not built.
    """
    _require_consistent(recipe, target)
    candidates = candidate_precisions(recipe, target)
    sources: dict[str, Artifact] = {} if search is None else {SEARCH: search}
    absent: dict[str, str] = {}
    wanted = {
        "data": pairs_assets(recipe.data),
        "teacher": teacher_assets(recipe.teacher),
        "student": student_assets(recipe.student),
        "reading": pretraining_assets(recipe.teacher),
        "auxiliary": auxiliary_assets(recipe.teacher.auxiliary.icons),
    }
    needs = {
        room: {name: f"{room}:{name}" for name in assets if (room, name) != ("teacher", "text")}
        for room, assets in wanted.items()
    }
    if recipe.data.source != "icons":
        for name, artifact in pairs_inputs(recipe.data, store, progress).items():
            sources[needs["data"].setdefault(name, f"data:{name}")] = artifact
    for name, artifact in pretraining_files(recipe.teacher).items():
        sources[needs["reading"].setdefault(name, f"reading:{name}")] = artifact
    for room, assets in wanted.items():
        for name, spec in assets.items():
            if download or is_fetched(spec, store):
                sources[f"{room}:{name}"] = fetch_asset(spec, store, progress)
            else:
                absent[f"{room}:{name}"] = spec
    if (text := sources.get("teacher:text")) is not None:
        require_targets(recipe.teacher, text)
        require_heirs_teacher(recipe.student.size, recipe.teacher.text, text)
    nodes = _nodes(recipe, target, candidates, needs, sources)
    return Plan(recipe=recipe, target=target, nodes=nodes, sources=sources, absent=absent)


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
    needs: Mapping[str, Mapping[str, str]],
    sources: Mapping[str, Artifact],
) -> tuple[Node, ...]:
    upstream = tuple(_upstream(recipe, target, candidates, needs))
    return (*upstream, _pack_node(recipe, target, sources, upstream))


def _upstream(
    recipe: Recipe,
    target: Target,
    candidates: tuple[Literal["fp16", "int8"], ...],
    needs: Mapping[str, Mapping[str, str]],
) -> Iterator[Node]:
    teacher, student, seed = recipe.teacher, recipe.student, recipe.seed
    evaluation = EvaluationConfig(seed=seed, size=student.size, resolution=student.resolution)
    towers = {"distil-image": "distil-image", "distil-text": "distil-text", "teacher": "teacher"}
    yield Node(stage=pairs_stage(recipe.data, seed=seed), needs=needs["data"])
    yield Node(
        stage=BackbonesStage(BackbonesConfig(image=teacher.image, resolution=teacher.resolution)),
        needs=needs["teacher"],
    )
    yield Node(
        stage=FeaturesStage(FeaturesConfig(views=teacher.views, seed=seed)),
        needs={"pairs": "pairs", "backbones": "backbones"},
    )
    read = {"pretraining": "pretraining"} if teacher.pretraining.epochs else {}
    if read:
        yield Node(
            stage=PretrainingStage(teacher, seed=seed, max_length=student.max_length),
            needs={"pairs": "pairs", "text": "teacher:text", **needs["reading"]},
        )
    backbones, features = "backbones", "features"
    if teacher.image_blocks:
        tuned = {"pairs": "pairs", "backbones": backbones, "features": features, "text": "teacher:text"}
        yield Node(
            stage=ImageTuningStage(teacher, seed=seed, max_length=student.max_length),
            needs={**tuned, **needs["teacher"], **read},
        )
        backbones, features = "image-tuning", "tuned-features"
        yield Node(
            stage=TunedFeaturesStage(FeaturesConfig(views=teacher.views, seed=seed)),
            needs={"pairs": "pairs", "backbones": backbones},
        )
    auxiliary = {}
    if teacher.auxiliary.icons:
        yield Node(
            stage=AuxiliaryPairsStage(AuxiliaryPairsConfig(icons=teacher.auxiliary.icons)),
            needs={"pairs": "pairs", **needs["auxiliary"]},
        )
        yield Node(
            stage=AuxiliaryFeaturesStage(FeaturesConfig(views=teacher.views, seed=seed)),
            needs={"pairs": "auxiliary-pairs", "backbones": backbones},
        )
        auxiliary = {name: name for name in ("auxiliary-pairs", "auxiliary-features")}
    yield Node(
        stage=TeacherStage(teacher, seed=seed, max_length=student.max_length),
        needs={"pairs": "pairs", "features": features, "text": "teacher:text", **read, **auxiliary},
    )
    yield Node(
        stage=TeacherEvaluation(EvaluationConfig(seed=seed)),
        needs={"pairs": "pairs", "teacher": "teacher", "backbones": backbones},
    )
    yield Node(
        stage=TargetsStage(TargetsConfig(corpus=student.corpus, seed=seed)),
        needs={"pairs": "pairs", "teacher": "teacher"},
    )
    cached = {"pairs": "pairs", "teacher": "teacher", "targets": "targets"}
    inherits = student_shape(student.size).heir
    heir = {"text": "teacher:text"} if inherits else {}
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
    exporting = ExportStageConfig(export=recipe.export, size=student.size, resolution=student.resolution)
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
        needs={**models, "teacher": "teacher", "backbones": backbones},
    )
    yield Node(
        stage=CompileStage(compile_config(target, max_length=student.max_length, engine=recipe.engine)),
        needs={"quantize": "quantize"},
        per_target=True,
    )


def _pack_node(
    recipe: Recipe, target: Target, sources: Mapping[str, Artifact], upstream: Sequence[Node]
) -> Node:
    """Return the last node. It takes every stage before it, so that the bundle tells where it came from."""
    shown = {"student-search": SEARCH} if SEARCH in sources else {}
    return Node(
        stage=PackStage(PackStageConfig.of(recipe, target, sources)),
        needs={**{node.name: node.name for node in upstream}, **shown},
        per_target=True,
    )
