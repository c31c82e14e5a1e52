"""If these fail, pictures of other domains tell a teacher what an evaluation asks of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.assets import catalogue, fetch_asset
from edgeglm.core.artifact import Artifact, listing_of
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.stage import Context, StageResult
from edgeglm.core.store import Store, default_store_root
from edgeglm.data.auxiliary import (
    AuxiliaryPairsConfig,
    AuxiliaryPairsStage,
    auxiliary_assets,
    held_back_in,
    named_icons,
)
from edgeglm.data.icon_assets import icon_set_of
from edgeglm.data.iconsets import IconSet
from edgeglm.data.pairs import Pair, PairSet, Query, Track, empty_images, write_pairs
from tests.data.icon_packages import package

BOX = '<rect x="{}" y="2" width="9" height="{}" fill="{}"/>'


def pairs_of(
    folder: Path, *, held: dict[str, str], labelled: tuple[str, ...], asked: tuple[str, ...]
) -> Artifact:
    """Write pairs whose held images are the given bodies, drawn as the stage draws them."""
    from edgeglm.data.iconsets import rgb_from_svg

    folder.mkdir(parents=True)
    names = [*labelled, *held]
    images = empty_images(folder, count=len(names), size=16)
    images[:] = 255
    for i, body in enumerate(held.values(), len(labelled)):
        if body:
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{body}</svg>'
            images[i] = rgb_from_svg(svg, 16)
    for i in range(len(labelled)):
        images[i, i % 16] = 10 * i
    images.flush()
    rows = [
        Pair(
            id=f"own/{name}",
            text=name,
            captions=(name,),
            concept=name,
            domain="own",
            role="held" if name in held else "labelled",
        )
        for name in names
    ]
    gallery = tuple(range(len(labelled), len(names)))
    track = Track(
        name="words",
        title="Words",
        query_kind="keywords",
        queries=tuple(Query(text=text, relevant=gallery[:1]) for text in asked),
        gallery=gallery,
    )
    write_pairs(folder, rows=rows, tracks=[track], licences=[], summary={})
    return Artifact(kind="pairs", path=folder, files=listing_of(folder), provenance={})


def made(tmp_path: Path, pairs: Artifact, icons: dict[str, str]) -> StageResult:
    bodies = {name: {"body": body} for name, body in icons.items()}
    content = {"prefix": "temaki", "icons": bodies, "width": 16, "height": 16}
    one = package(tmp_path / "temaki", "temaki", {"icons.json": content, "chars.json": {}})
    stage = AuxiliaryPairsStage(AuxiliaryPairsConfig(icons=("temaki",)))
    context = Context(store=Store(tmp_path / "store"), progress=QuietProgress(), threads=1)
    return stage({"pairs": pairs, "temaki": one}, context)


def test_nothing_that_is_held_is_named_asked_or_shown(tmp_path: Path) -> None:
    twin = BOX.format(3, 11, "green")
    pairs = pairs_of(
        tmp_path / "pairs",
        held={"glass box": "", "dragon": twin},
        labelled=("house", "fruit"),
        asked=("dessert", "house"),
    )
    icons = {
        "dragon-fruit": BOX.format(0, 3, "red"),
        "dragons": BOX.format(0, 4, "red"),
        "boxes-of-glass": BOX.format(0, 5, "red"),
        "box": BOX.format(0, 6, "red"),
        "dessert": BOX.format(0, 7, "red"),
        "desserts": BOX.format(0, 2, "red"),
        "dessert-fork": BOX.format(0, 8, "red"),
        "house": BOX.format(0, 9, "blue"),
        "lizard": twin,
        "crane": BOX.format(6, 11, "red"),
    }
    result = made(tmp_path, pairs, icons)
    found = PairSet.open(result.artifact)
    assert [row.text for row in found.rows] == ["box", "crane", "dessert fork", "house"]
    assert {row.role for row in found.rows} == {"labelled"}
    assert {row.domain for row in found.rows} == {"temaki"}
    assert found.summary["left_out"] == {
        "says an unseen name": 3,
        "is worded as a query": 2,
        "looks like an evaluated image": 1,
    }
    assert [entry.name for entry in found.licences] == ["temaki"]
    assert found.image_size == PairSet.open(pairs).image_size
    assert len(set(found.image_sha256)) == 4


def test_a_picture_that_a_track_seeks_unlabelled_gets_no_name_either(tmp_path: Path) -> None:
    twin = BOX.format(3, 11, "green")
    pairs = pairs_of(tmp_path / "pairs", held={"lizard": twin}, labelled=("house", "tree"), asked=("newt",))
    rows = [
        msgspec.structs.replace(row, role="unlabelled" if row.role == "held" else "labelled")
        for row in PairSet.open(pairs).rows
    ]
    write_pairs(pairs.path, rows=rows, tracks=PairSet.open(pairs).tracks, licences=[], summary={})
    pairs = Artifact(kind="pairs", path=pairs.path, files=listing_of(pairs.path), provenance={})
    result = made(tmp_path, pairs, {"lizard": twin, "crane": BOX.format(6, 11, "red")})
    assert [row.text for row in PairSet.open(result.artifact).rows] == ["crane"]


def test_a_set_of_which_nothing_may_train_is_refused(tmp_path: Path) -> None:
    twin = BOX.format(3, 11, "green")
    pairs = pairs_of(tmp_path / "pairs", held={"dragon": twin}, labelled=("house", "tree"), asked=())
    with pytest.raises(UserError, match=r"no icon of temaki may be trained on"):
        made(tmp_path / "copies", pairs, {"lizard": twin})
    with pytest.raises(UserError, match=r"no icon of temaki may be trained on.*; name other sets in teacher"):
        made(tmp_path, pairs, {"dragon-head": BOX.format(0, 3, "red"), "x": BOX.format(0, 4, "red")})


@pytest.mark.parametrize(
    ("icons", "texts"),
    [
        (("bat", "bat-outline", "bat-2", "bat-outline-24px"), ["bat"]),
        (("owl-outline", "owl-negative"), ["owl", "owl"]),
        (("chair-2", "chair-5"), ["chair", "chair"]),
        (("flat-tire", "light-bulb"), ["flat tire", "light bulb"]),
        (("letter-a", "42", "3d-glasses"), ["3d glasses"]),
        (("wave", "wave-dark-skin-tone"), ["wave"]),
    ],
)
def test_a_thing_counts_once_however_it_is_drawn(icons: tuple[str, ...], texts: list[str]) -> None:
    drawn = IconSet(name="x", icons=dict.fromkeys(icons, "<svg/>"), aliases={}, codes={})
    assert [text for _, text in named_icons(drawn)] == texts


@given(
    st.lists(st.sampled_from(["ear", "ears", "corn", "of", "bus", "buses", "glass", "glasses"]), min_size=1)
)
def test_whatever_says_all_words_of_an_unseen_name_is_held_back(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    global _PAIRS
    if _PAIRS is None:
        folder = tmp_path_factory.mktemp("own") / "pairs"
        held = {"ear of corn": "", "bus": "", "glasses": ""}
        _PAIRS = PairSet.open(pairs_of(folder, held=held, labelled=("house", "tree"), asked=()))
    single = {word.removesuffix("es") if word in ("buses", "glasses") else word.rstrip("s") for word in words}
    single |= {"bus"} & {*words} | {"glass"} & {*words}
    unseen = {"ear", "of", "corn"} <= single or not {"bus", "buses", "glass", "glasses"}.isdisjoint(words)
    assert bool(held_back_in(_PAIRS)(" ".join(words))) == unseen


_PAIRS: PairSet | None = None


def test_an_unknown_set_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"'game-icon'.*did you mean 'game-icons'"):
        auxiliary_assets(("game-icon",))
    assert auxiliary_assets(("temaki", "temaki")) == {"temaki": "temaki"}


@pytest.mark.assets
def test_the_pinned_sets_name_what_they_draw() -> None:
    store = Store(default_store_root())
    names = [name for name, asset in catalogue().items() if "auxiliary-icons" in asset.roles]
    assert len(names) == 4
    for name in names:
        found = dict(named_icons(icon_set_of(name, fetch_asset(name, store, QuietProgress()))))
        assert len(found) > 400, name
        assert not any("outline" in text.split()[-1:] for text in found.values()), name
