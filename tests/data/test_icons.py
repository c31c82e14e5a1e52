"""The founding pairs are split so that no figure can be fooled, and come out the same every time."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.assets import asset_member, catalogue, fetch_asset
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import DataConfig
from edgeglm.core.stage import Context
from edgeglm.core.store import Store, default_store_root
from edgeglm.data.categories import CATEGORIES_ASSET
from edgeglm.data.concepts import base_concept, concepts_of, is_skin_tone_variant
from edgeglm.data.icons import KEYWORDS_ASSET, PairsConfig, PairsStage, icon_asset_names
from edgeglm.data.iconsets import icon_set_from_json, rgb_from_svg
from edgeglm.data.pairs import PairSet
from edgeglm.data.splits import drawn_groups, joined_groups
from edgeglm.data.tracks import folded, keywords_from_cldr
from tests.data.icon_packages import NAMES, STYLES, built, package


def test_roles_keep_what_is_evaluated_out_of_training(packages: dict[str, Artifact], tmp_path: Path) -> None:
    pairs = PairSet.open(built(packages, tmp_path / "store", unseen_fraction=0.25).artifact)
    roles = defaultdict(set)
    for row in pairs.rows:
        roles[row.concept].add((row.domain == "twemoji", row.role))
    unseen = {concept for concept, found in roles.items() if found == {(True, "held"), (False, "held")}}
    assert unseen
    for concept in set(roles) - unseen:
        assert {role for is_target, role in roles[concept] if not is_target} == {"labelled"}
    assert {row.role for row in pairs.rows if row.domain == "twemoji"} == {"held", "unlabelled"}
    assert not pairs.overlap(pairs.by_role("labelled", "unlabelled").tolist())


def test_variants_and_twin_images_never_straddle(packages: dict[str, Artifact], tmp_path: Path) -> None:
    for fraction in (0.1, 0.3, 0.6):
        pairs = PairSet.open(built(packages, tmp_path / "store", unseen_fraction=fraction).artifact)
        role = {row.concept: row.role for row in pairs.rows if row.domain == "noto"}
        assert role["cook"] == role["man-cook"] == role["woman-cook"]
        assert role["left-arrow"] == role["right-arrow"]
        assert role["flag-norway"] == role["flag-bouvet-island"]


def test_concepts_are_joined_by_name_code_point_and_alias(
    packages: dict[str, Artifact], tmp_path: Path
) -> None:
    pairs = PairSet.open(built(packages, tmp_path / "store").artifact)
    domains = defaultdict(set)
    for row in pairs.rows:
        domains[row.concept].add(row.domain)
    assert domains["dog"] == set(STYLES)
    assert domains["sun"] == set(STYLES) - {"emojione"}
    assert "star" not in domains
    assert "man-cook-dark-skin-tone" not in domains
    assert "light-bulb" in domains
    captions = next(row.captions for row in pairs.rows if row.id == "openmoji/dog")
    assert captions == ("dog", "canine", "doggy")


def test_keyword_queries_were_never_trained_on_and_miss_no_right_image(
    packages: dict[str, Artifact], tmp_path: Path
) -> None:
    pairs = PairSet.open(built(packages, tmp_path / "store", unseen_fraction=0.25).artifact)
    trained = {folded(text) for text in pairs.training_texts()}
    for track in pairs.tracks:
        if track.query_kind != "keywords":
            continue
        texts = [query.text for query in track.queries]
        assert trained.isdisjoint(texts)
        assert "" not in texts
        for query in track.queries:
            if query.text == "thing":
                assert set(query.relevant) == set(track.gallery)
            if track.name == "catalogue-inductive-keywords":
                assert {pairs.rows[i].role for i in query.relevant} == {"held"}
    names = {track.name for track in pairs.tracks}
    assert {"catalogue-transductive", "catalogue-inductive", "unseen", "unseen-keywords"} <= names


def test_twin_images_are_equally_right(packages: dict[str, Artifact], tmp_path: Path) -> None:
    pairs = PairSet.open(built(packages, tmp_path / "store").artifact)
    flags = [query for track in pairs.tracks[:3] for query in track.queries if query.text.startswith("flag")]
    assert flags
    assert all(len(query.relevant) == 2 for query in flags)


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads(
    packages: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = built(packages, tmp_path / "one")
    monkeypatch.setattr("edgeglm.data.rendering._BATCH", 8)
    two = built(packages, tmp_path / "two", threads=2)
    assert one.artifact.digest == two.artifact.digest
    other = PairsStage(PairsConfig(seed=1, data=DataConfig(image_size=16)))(
        packages, Context(store=Store(tmp_path / "one"), progress=QuietProgress())
    )
    assert other.artifact.digest != one.artifact.digest


def test_a_reduced_set_keeps_variants_together(packages: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = built(packages, tmp_path / "store", concepts=6).artifact
    concepts = {row.concept for row in PairSet.open(artifact).rows}
    assert len(concepts) == 6


def test_licences_travel_with_the_pairs(packages: dict[str, Artifact], tmp_path: Path) -> None:
    pairs = PairSet.open(built(packages, tmp_path / "store").artifact)
    assert [licence.name for licence in pairs.licences] == [*DataConfig().labelled, "twemoji", KEYWORDS_ASSET]
    assert all(licence.attribution for licence in pairs.licences)


def test_icons_are_told_their_groups_where_the_recipe_asks(
    packages: dict[str, Artifact], tmp_path: Path
) -> None:
    plain = PairSet.open(built(packages, tmp_path / "store").artifact)
    assert {(row.category, row.subcategory) for row in plain.rows} == {("", "")}
    listed = [
        {"codes": f"1F{i:03X} FE0F", "group": "Things", "subgroup": f"kind-{i % 3}", "name": name}
        for i, name in enumerate(NAMES[:-1])
    ]
    asset = package(tmp_path / "groups", "emoji.json", {"emoji.json": listed})
    made = built({**packages, CATEGORIES_ASSET: asset}, tmp_path / "store", categories=True).artifact
    pairs = PairSet.open(made)
    kinds = {row.concept: (row.category, row.subcategory) for row in pairs.rows}
    for i, name in enumerate(NAMES):
        if name in kinds:
            assert kinds[name] == (("Things", f"kind-{i % 3}") if name != NAMES[-1] else ("", ""))
    assert CATEGORIES_ASSET in [licence.name for licence in pairs.licences]
    assert CATEGORIES_ASSET in icon_asset_names(DataConfig(categories=True))
    assert CATEGORIES_ASSET not in icon_asset_names(DataConfig())


def test_a_wrong_style_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'openmoji'"):
        icon_asset_names(DataConfig(labelled=("openmojy",)))
    with pytest.raises(UserError, match=r"take it out of data\.labelled"):
        PairsStage(PairsConfig(data=DataConfig(labelled=("twemoji",)))).requires({})


def test_an_icon_is_drawn_on_white_centred_and_mirrored() -> None:
    content = {
        "prefix": "toy",
        "icons": {"tall": {"body": '<rect width="1" height="4" fill="red"/>', "width": 2, "height": 4}},
        "aliases": {"llat": {"parent": "tall", "hFlip": True}, "big": {"parent": "tall"}},
    }
    icons = icon_set_from_json(json.dumps(content).encode(), b"{}")
    pixels = rgb_from_svg(icons.icons["tall"], 8)
    assert pixels.shape == (8, 8, 3)
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:4] == (255, 0, 0)).all()
    np.testing.assert_array_equal(rgb_from_svg(icons.icons["llat"], 8), pixels[:, ::-1])
    assert icons.aliases == {"big": "tall"}


@pytest.mark.parametrize(
    ("variants", "base"),
    [
        (["cook", "man-cook", "woman-cook"], "cook"),
        (["man-running", "woman-running-facing-right", "person-running"], "running"),
        (["man", "woman-red-hair", "person-beard", "man-bald"], "person"),
        (["boy", "girl", "child"], "child"),
        (["family", "family-man-woman-boy", "family-adult-child"], "family"),
        (["mermaid", "merman", "merperson"], "merperson"),
        (["up-arrow", "down-left-arrow"], "arrow"),
        (["kiss", "kiss-man-man"], "kiss"),
        (["kiss-mark"], "kiss-mark"),
        (["lady-beetle"], "lady-beetle"),
        (["snowman"], "snowman"),
    ],
)
def test_variants_share_their_base(variants: list[str], base: str) -> None:
    assert {base_concept(name) for name in variants} == {base}


@given(st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1))
def test_a_base_concept_always_has_a_name(name: str) -> None:
    assert base_concept(name)


def test_a_bulb_is_not_a_skin_tone() -> None:
    assert is_skin_tone_variant("cook-medium-light-skin-tone")
    assert not is_skin_tone_variant("police-car-light")
    assert not is_skin_tone_variant("black-medium-square")


@given(
    st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 9), min_size=2, max_size=30),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_a_draw_is_never_empty_nor_everything(sizes: dict[str, int], fraction: float, seed: int) -> None:
    drawn = drawn_groups(sizes, fraction, seed=seed, purpose="test")
    assert 0 < len(drawn) < len(sizes)
    assert drawn == drawn_groups(dict(reversed(sizes.items())), fraction, seed=seed, purpose="test")


def test_groups_join_over_several_steps() -> None:
    groups = joined_groups([["b", "a"], ["c"], ["d", "b"], ["e", "c"]])
    assert groups == {"a": "a", "b": "a", "d": "a", "c": "c", "e": "c"}


def test_keywords_are_read_without_variation_selectors() -> None:
    data = {"annotations": {"annotations": {"❤️": {"default": ["Love", "!", "two-fold"], "tts": ["x"]}}}}
    assert keywords_from_cldr(json.dumps(data).encode()) == {"2764": {"love", "two fold"}}
    with pytest.raises(UserError, match="not a CLDR"):
        keywords_from_cldr(b"[]")


@pytest.mark.assets
def test_the_real_sets_give_the_catalogue_and_code_points_confirm_the_variants() -> None:
    store = Store(default_store_root())
    sets = {}
    for style in STYLES:
        members, asset = catalogue()[style].members, fetch_asset(style, store, QuietProgress())
        icons, chars = asset_member(asset, members["icons"]), asset_member(asset, members["chars"])
        sets[style] = icon_set_from_json(icons, chars)
    concepts = concepts_of(sets)
    assert len(concepts) == 1652
    assert Counter(style for concept in concepts for style in concept.icons) == {
        "noto": 1652, "openmoji": 1652, "twemoji": 1652, "fluent-emoji-flat": 1595, "emojione": 1111,
    }  # fmt: skip
    # Unicode itself says who is a variant: a person, a gender sign, a hair part or a direction is joined on.
    bases = defaultdict(set)
    for concept in concepts:
        for code in concept.codes:
            plain = re.sub(r"-200d-(2640|2642|27a1|1f9b[0-3])", "", code)
            plain = re.sub(r"\b(1f468|1f469|1f9d1)\b", "person", plain)
            bases[plain].add(concept.base)
    assert {code: found for code, found in bases.items() if len(found) > 1} == {}


@pytest.mark.assets
def test_sixty_real_concepts_become_pairs(tmp_path: Path) -> None:
    data = DataConfig(concepts=60, image_size=64)
    store = Store(default_store_root())
    inputs = {name: fetch_asset(name, store, QuietProgress()) for name in icon_asset_names(data)}
    result = PairsStage(PairsConfig(data=data))(
        inputs, Context(store=Store(tmp_path / "store"), progress=QuietProgress(), threads=2)
    )
    pairs = PairSet.open(result.artifact)
    assert pairs.summary["concepts"] == 60
    assert pairs.summary["copies_across_sides"] == 0
    assert len(pairs.track("catalogue-transductive").gallery) == 60
    assert len(pairs.tracks) == 6
    ink = (pairs.images[:].reshape(len(pairs), -1) < 250).mean(axis=1)
    assert ink.min() > 0.005, "an icon came out blank"
