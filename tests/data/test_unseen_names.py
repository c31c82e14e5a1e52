"""If these fail, a name that an evaluation holds out is trained on in another spelling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeglm.data.pairs import Pair, PairSet
from edgeglm.data.unseen_names import UnseenNames, forms_of, unseen_names


@pytest.mark.parametrize(
    ("unseen", "text"),
    [
        ("trophy", "trophies shelf"),
        ("strawberries", "strawberry jam"),
        ("postbox", "post box"),
        ("post box", "red postbox"),
        ("ice cream", "icecream cone"),
        ("house", "houses"),
        ("axe", "crossed axes"),
        ("tomato", "tomatoes"),
        ("kitchen knife", "knives in a kitchen"),
        ("maple leaf", "maple leaves"),
        ("octopus", "octopuses"),
        ("tooth", "teeth"),
        ("piñata", "pinata"),
        ("woman's boot", "womans boots"),
        ("\uff44\uff52\uff41\uff47\uff4f\uff4e", "dragon head"),
        ("a picture of a house", "picture of a house"),
    ],
)
def test_a_name_is_said_however_it_is_spelt(unseen: str, text: str) -> None:
    assert UnseenNames([unseen]).said_by(text)


@pytest.mark.parametrize(
    ("unseen", "text"),
    [
        ("car", "care"),
        ("glass box", "box"),
        ("ear of corn", "ear"),
        ("pin", "pine tree"),
        ("boss", "bo"),
        ("pineapple", "pine tree and apple"),
        ("!", "mark"),
    ],
)
def test_other_words_are_other_words(unseen: str, text: str) -> None:
    assert not UnseenNames([unseen]).said_by(text)


def test_short_words_and_those_in_ss_are_no_plurals() -> None:
    assert [forms_of(word) for word in ("bus", "gas", "dress")] == [{"bus"}, {"gas"}, {"dress"}]


def pairs_of(*rows: tuple[str, str, str]) -> PairSet:
    made = tuple(
        Pair(id=f"x/{i}", text=text, captions=(text,), concept=concept, domain="x", role=role)  # type: ignore[arg-type]
        for i, (role, concept, text) in enumerate(rows)
    )
    images = np.zeros((len(made), 8, 8, 3), np.uint8)
    return PairSet(path=Path(), images=images, rows=made, tracks=(), licences=(), summary={})


def test_an_unseen_concept_has_its_english_name_in_every_language() -> None:
    chinese = unseen_names(
        pairs_of(
            ("held", "dragon-face", "龙脸"),
            ("held", "apple", "苹果"),
            ("labelled", "apple", "苹果"),
            ("unlabelled", "pear", "梨"),
        )
    )
    assert chinese.said_by("faces of dragons")
    assert not chinese.said_by("apple")
    assert not chinese.said_by("pear")


def test_what_a_labelled_pair_says_is_not_unseen() -> None:
    found = unseen_names(pairs_of(("held", "dog", "dog"), ("labelled", "puppy", "dog")))
    assert not found.said_by("dog")
