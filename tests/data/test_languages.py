"""If these fail, a Chinese figure is of other words than it says, or of words that were trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import DataConfig, recipe_from_toml
from edgeglm.data.concepts import Concept
from edgeglm.data.icons import KEYWORDS_ASSET, PairsConfig, PairsStage
from edgeglm.data.languages import folded, names_from_cldr, spoken_in
from edgeglm.data.pairs import PairSet
from tests.data.icon_packages import NAMES, built, package

SAID = "红苹果 青梨 厨师 男厨师 女厨师 深色男厨师 灯泡 左箭 右箭 狗 猫 房子 星 挪威 布韦岛 太阳"
CHINESE = dict(zip(NAMES, SAID.split(), strict=True))


def cldr_file(names: dict[str, str]) -> bytes:
    entries = {
        chr(0x1F000 + i): {"default": ["东西", f"词{i}"], "tts": [names[name]]}
        for i, name in enumerate(NAMES)
        if name in names
    }
    return json.dumps({"annotations": {"annotations": entries}}).encode()


@pytest.fixture
def bilingual(packages: dict[str, Artifact], tmp_path: Path) -> dict[str, Artifact]:
    """The tiny icon sets with Chinese names for all but the house."""
    english = {chr(0x1F000 + i): {"default": ["thing", f"word {i}"]} for i in range(len(NAMES))}
    chinese = json.loads(cldr_file({name: text for name, text in CHINESE.items() if name != "house"}))
    content = {
        "annotations/en/annotations.json": {"annotations": {"annotations": english}},
        "annotations/zh/annotations.json": chinese,
    }
    return {**packages, KEYWORDS_ASSET: package(tmp_path / "both", "cldr", content)}


def test_chinese_alone_trains_and_asks_in_chinese(bilingual: dict[str, Artifact], tmp_path: Path) -> None:
    pairs = PairSet.open(built(bilingual, tmp_path / "store", language="zh", unseen_fraction=0.25).artifact)
    texts = {text for row in pairs.rows for text in row.captions}
    assert texts <= set(CHINESE.values())
    assert "house" not in {row.concept for row in pairs.rows}, "it has no Chinese name"
    assert {track.name for track in pairs.tracks} >= {"catalogue-transductive", "unseen", "unseen-keywords"}
    assert {track.language for track in pairs.tracks} == {"zh"}
    asked = {query.text for track in pairs.tracks for query in track.queries}
    assert "东西" in asked
    assert not any(text.isascii() for text in asked)


def test_both_languages_share_images_and_have_tracks_of_their_own(
    bilingual: dict[str, Artifact], tmp_path: Path
) -> None:
    artifact = built(bilingual, tmp_path / "store", language=("zh", "en"), unseen_fraction=0.25).artifact
    pairs = PairSet.open(artifact)
    captions = {row.concept: row.captions for row in pairs.rows}
    assert captions["red-apple"] == ("红苹果", "red apple")
    assert captions["house"] == ("house",)
    assert pairs.tracks[0].name == "catalogue-transductive"
    assert pairs.tracks[0].language == "zh"
    for name in ("catalogue-transductive", "catalogue-inductive", "unseen", "unseen-keywords"):
        chinese, english = pairs.track(name), pairs.track(f"en-{name}")
        assert chinese.gallery == english.gallery
        assert english.language == "en"
        assert all(query.text.isascii() for query in english.queries)
        assert not any(query.text.isascii() for query in chinese.queries)
        assert chinese.title.endswith("in Chinese")
    for track in pairs.tracks:
        for query in track.queries if track.query_kind == "names" else ():
            assert any(query.text in pairs.rows[i].captions for i in query.relevant)


def test_no_name_of_an_unseen_concept_trains_in_any_language(
    bilingual: dict[str, Artifact], tmp_path: Path
) -> None:
    pairs = PairSet.open(
        built(bilingual, tmp_path / "store", language=("en", "zh"), unseen_fraction=0.25).artifact
    )
    trained = {folded(text) for text in pairs.training_texts()}
    for name in ("unseen", "zh-unseen", "unseen-keywords", "zh-unseen-keywords"):
        assert trained.isdisjoint(folded(query.text) for query in pairs.track(name).queries), name
    held = {row.concept for row in pairs.rows if row.role == "held"} - {
        row.concept for row in pairs.rows if row.role == "labelled"
    }
    assert held
    assert trained.isdisjoint(CHINESE[name] for name in held if name != "house")


def test_a_name_that_two_concepts_share_is_the_name_of_neither() -> None:
    concepts = [
        Concept(name=name, base=name, captions=(name,), icons={}, codes=frozenset({code}))
        for name, code in (("ok", "1f000"), ("cat", "1f009"), ("cub", "1f00a"), ("sun", "1f00f"))
    ]
    entries = {"\U0001f000": "SUN", "\U0001f009": "猫", "\U0001f00a": "猫", "\U0001f00f": "太阳"}
    said = {chars: {"default": [], "tts": [text]} for chars, text in entries.items()}
    data = json.dumps({"annotations": {"annotations": said}}).encode()
    english, chinese = spoken_in(("en", "zh"), concepts, {"en": data, "zh": data})
    assert set(english.captions) == {"ok", "cat", "cub", "sun"}
    assert chinese.captions == {"sun": ("太阳",)}, "SUN is what another concept is called in English"


def test_names_are_read_without_variation_selectors() -> None:
    data = json.dumps({"annotations": {"annotations": {"❤️": {"tts": [" 红  心 "]}, "©": {"tts": ["①"]}}}})
    assert names_from_cldr(data.encode()) == {"2764": "红 心"}
    with pytest.raises(UserError, match="not a CLDR"):
        names_from_cldr(b"[]")


def test_a_recipe_names_one_language_or_several() -> None:
    assert DataConfig().languages() == ("en",)
    for text, expected in (('"zh"', ("zh",)), ('["zh", "en", "zh"]', ("zh", "en"))):
        recipe = recipe_from_toml(f"[data]\nlanguage = {text}\n", origin="here")
        assert recipe.data.languages() == expected
    with pytest.raises(UserError, match=r"data\.language"):
        recipe_from_toml('[data]\nlanguage = "xx"\n', origin="here")
    with pytest.raises(UserError, match='give "en"'):
        PairsStage(PairsConfig(data=DataConfig(language=()))).requires({})
