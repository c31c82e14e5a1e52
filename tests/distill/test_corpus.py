"""If these fail, a student is trained on the very texts that it is judged by."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgeglm.data.tracks import folded
from edgeglm.distill.corpus import distillation_texts, ordinary_words, whole_words

WORD = st.sampled_from(["red", "apple", "Blue", "sky", "well-known", "river", "stone", "cat"])
PHRASE = st.lists(WORD, min_size=1, max_size=3).map(" ".join)


def test_words_of_a_wordpiece_vocabulary_are_those_without_a_continuation_mark() -> None:
    entries = ["[PAD]", "[CLS]", "the", "##ing", "river", "The", "a", "42nd", "##s", "co2", "élan", "!"]
    assert whole_words(entries) == ["the", "river", "élan"]


def test_words_of_a_sentencepiece_vocabulary_are_those_that_start_one() -> None:
    assert whole_words(["<s>", "\u2581the", "ing", "\u2581River", "\u2581a", "\u2581", "stone"]) == [
        "the",
        "river",
    ]


def test_words_of_a_byte_level_vocabulary_are_those_after_a_space() -> None:
    assert whole_words(["<|endoftext|>", "\u0120the", "ing", "\u0120river", "\u0120x9y"]) == ["the", "river"]


def test_a_vocabulary_without_words_gives_none() -> None:
    assert whole_words([]) == []
    assert whole_words(["[PAD]", "##a", "7"]) == []


@given(
    captions=st.lists(PHRASE, max_size=6, unique=True),
    words=st.lists(st.sampled_from(["red", "apple", "sky", "stone"]), max_size=4, unique=True),
    excluded=st.lists(PHRASE.map(str.upper) | PHRASE.map(lambda text: text.replace(" ", "-")), max_size=12),
    count=st.integers(0, 40),
    seed=st.integers(0, 5),
)
def test_no_evaluated_text_is_drawn_whatever_its_case_or_hyphens(
    captions: list[str], words: list[str], excluded: list[str], count: int, seed: int
) -> None:
    texts = distillation_texts(captions, words, count=count, excluded=excluded, seed=seed)
    assert texts[: len(captions)] == captions, "captions come first, as the teacher's rows do"
    drawn = texts[len(captions) :]
    assert {folded(text) for text in drawn}.isdisjoint(folded(text) for text in excluded)
    assert {folded(text) for text in drawn}.isdisjoint(folded(text) for text in captions)
    assert len({folded(text) for text in drawn}) == len(drawn) <= count
    assert texts == distillation_texts(captions, words, count=count, excluded=excluded, seed=seed)


def test_words_of_the_domain_meet_ordinary_ones() -> None:
    texts = distillation_texts(["red apple"], ["river", "stone"], count=200, excluded=(), seed=0)
    drawn = " ".join(texts[1:]).split()
    assert {"red", "apple", "river", "stone"} <= set(drawn)
    assert {len(text.split()) for text in texts[1:]} == {1, 2, 3}


def test_chinese_captions_bring_chinese_words_and_no_other_scripts() -> None:
    entries = [
        "<s>",
        "\u2581river",
        "\u2581\u05d0\u05d1\u05d2",
        "\u2581straße",
        "苹果",
        "\u2581红色",
        "龘",
        "狗",
        "stone",
        "##x",
    ]
    words = ordinary_words(entries, ["小狗 dog"])
    assert words == ["river", "straße", "苹果", "红色", "狗"], "of single characters those of the captions"
    assert ordinary_words(entries, ["dog"]) == whole_words(entries), "what was, where no caption is Chinese"


def test_chinese_words_are_joined_without_a_space_and_none_is_asked_for() -> None:
    texts = distillation_texts(
        ["红苹果", "狗"], ["河流", "石头"], count=300, excluded=["河流", "石头"], seed=0
    )
    drawn = texts[2:]
    assert {"狗河流", "河流狗"} & set(drawn)
    assert not {"河流", "石头"} & set(drawn)
    assert not any(" " in text for text in drawn)
