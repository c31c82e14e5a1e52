"""If these fail, a recipe's pictures of other domains change no teacher, or nobody is credited for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("peft", reason="the host half is not installed")

from edgeglm.adapt import alignment as room
from edgeglm.assets.fetch import fetch_asset
from edgeglm.build import pipeline
from edgeglm.build.adapting import adapt_teacher
from edgeglm.build.pack_manifest import licences_of
from edgeglm.build.pack_stage import PackStageConfig
from edgeglm.build.pipeline import plan_build, stage_names
from edgeglm.build.unheard import require_elsewhere
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import DataConfig, Recipe, recipe_from_file
from edgeglm.core.stage import Context
from edgeglm.core.store import Store
from edgeglm.data.pairs import PairSet
from edgeglm.targets.schema import load_target
from tests.data.icon_packages import package
from tests.tiny_towers import write_project

THINGS = ("lamp", "kettle", "ladder", "anchor", "violin", "candle", "tractor", "basket")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def local_icons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Serve a tiny set in the place of one that is fetched."""
    icons = {name: {"body": f'<path d="M{i} {i}h{3 + i}v{12 - i}z"/>'} for i, name in enumerate(THINGS)}
    content = {"prefix": "temaki", "icons": icons, "width": 16, "height": 16}
    made = package(tmp_path / "temaki", "temaki", {"icons.json": content, "chars.json": {}})

    def fetched(spec: str, *rest: Any) -> Artifact:
        return made if spec == "temaki" else fetch_asset(spec, *rest)

    monkeypatch.setattr("edgeglm.build.sources.fetch_asset", fetched)
    monkeypatch.setattr(room, "MIN_STEPS", 12)
    monkeypatch.setattr(room, "MIN_LORA_STEPS", 4)
    return made


def wanted(project: Path, *more: str) -> Recipe:
    options = ['teacher.auxiliary.icons=["temaki"]', "teacher.auxiliary.epochs=2", *more]
    return recipe_from_file(project / "recipe.toml", overrides=options)


def context(store: Path) -> Context:
    return Context(store=Store(store), progress=QuietProgress(), threads=1)


def test_a_teacher_learns_them_and_a_rate_of_later_changes_no_picture(project: Path, tmp_path: Path) -> None:
    plain = adapt_teacher(recipe_from_file(project / "recipe.toml"), tmp_path / "a", context(tmp_path / "s"))
    made = adapt_teacher(wanted(project), tmp_path / "b", context(tmp_path / "s"))
    ran = {result.stage: result for result in made.results}
    assert [name for name, result in ran.items() if not result.reused] == [
        "auxiliary-pairs", "auxiliary-features", "teacher", "teacher-evaluation",
    ]  # fmt: skip
    assert made.teacher.digest != plain.teacher.digest
    curves = made.teacher.provenance["measured"]["curves"]
    assert list(curves) == ["auxiliary", "warm-up", "lora", "heads"]
    named = PairSet.open(ran["auxiliary-pairs"].artifact)
    assert [row.text for row in named.rows] == sorted(THINGS)
    other = adapt_teacher(
        wanted(project, "teacher.auxiliary.replay=0.0"), tmp_path / "c", context(tmp_path / "s")
    )
    assert [result.stage for result in other.results if not result.reused] == [
        "teacher",
        "teacher-evaluation",
    ]
    assert other.teacher.digest != made.teacher.digest


def test_whom_to_credit_for_them_travels_with_the_bundle(project: Path, tmp_path: Path) -> None:
    made = adapt_teacher(wanted(project), tmp_path / "b", context(tmp_path / "s"))
    artifacts = {result.stage: result.artifact for result in made.results}
    pairs = PairSet.open(artifacts["pairs"])
    assert {record.name for record in licences_of(artifacts, pairs)} == {"own", "temaki"}
    del artifacts["auxiliary-pairs"]
    assert {record.name for record in licences_of(artifacts, pairs)} == {"own"}


def test_pictures_are_credited_once(project: Path, tmp_path: Path) -> None:
    plan = plan_build(wanted(project), load_target("cpu"), Store(tmp_path / "s"), QuietProgress())
    assert "auxiliary:temaki" in plan.sources
    packed = plan.nodes[-1].stage.config
    assert isinstance(packed, PackStageConfig)
    assert {record.name for record in packed.weights} == {"vit", "bert"}


def test_a_build_lays_them_out_before_the_teacher_and_packs_them(project: Path, tmp_path: Path) -> None:
    target = load_target("cpu")
    names = stage_names(wanted(project), target)
    place = names.index("teacher")
    assert names[place - 2 : place] == ["auxiliary-pairs", "auxiliary-features"]
    plan = plan_build(wanted(project), target, Store(tmp_path / "s"), QuietProgress())
    nodes = {node.name: node for node in plan.nodes}
    assert nodes["auxiliary-pairs"].needs == {"pairs": "pairs", "temaki": "auxiliary:temaki"}
    assert plan.sources["auxiliary:temaki"].provenance["name"] == "temaki"
    assert nodes["pack"].needs["auxiliary-pairs"] == "auxiliary-pairs"
    assert "auxiliary-features" in nodes["teacher"].needs
    assert {origin.partition(":")[0] for origin in plan.sources} <= set(pipeline.ROOMS)


@pytest.mark.parametrize(
    ("icons", "message"),
    [
        (("twemoji",), r"names twemoji, which data\.labelled or data\.target names too; .*take it out"),
        (("noto",), r"names noto, which data\.labelled"),
        (("game-icon",), "did you mean 'game-icons'"),
    ],
)
def test_a_style_that_is_evaluated_is_no_other_domain(icons: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_elsewhere(icons, DataConfig())
    require_elsewhere(("noto",), DataConfig(source="folder", path="here"))
