"""If these fail, the examples in the report are picked to please, or name the wrong image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from edgeglm.evaluate.examples import example_retrievals, hard_retrievals


@dataclass(frozen=True)
class Query:
    text: str
    relevant: tuple[int, ...]


@dataclass(frozen=True)
class Track:
    name: str
    queries: tuple[Query, ...]
    gallery: tuple[int, ...]


IMAGES = np.eye(6, dtype=np.float32)
TRACK = Track("t", tuple(Query(f"q{image}", (image,)) for image in (5, 4, 3, 2)), (5, 3, 2, 4))


def test_successes_come_first_and_failures_are_shown_too() -> None:
    asked = IMAGES[[5, 4, 2, 3]]  # the last two find each other's image
    found = example_retrievals(TRACK, asked, IMAGES, right=2, wrong=2, k=3)
    assert [one.answers[0].right for one in found] == [True, True, False, False]
    assert {one.query for one in found[2:]} == {"q3", "q2"}
    by_query = {one.query: one for one in found}
    assert by_query["q5"].answers[0].image == 5
    assert by_query["q3"].answers[0].image == 2
    assert len(found[0].answers) == 3


def test_the_draw_repeats_and_is_not_the_first_few() -> None:
    track = Track("t", tuple(Query(f"q{i}", (i % 6,)) for i in range(60)), tuple(range(6)))
    asked = IMAGES[[i % 6 for i in range(60)]]
    one = example_retrievals(track, asked, IMAGES, right=5, wrong=5, seed=1)
    assert one == example_retrievals(track, asked, IMAGES, right=5, wrong=5, seed=1)
    assert len(one) == 5
    assert [r.query for r in one] != [f"q{i}" for i in range(5)]


def test_the_worst_failures_come_first_with_what_they_wanted_and_its_rank() -> None:
    asked = IMAGES[[5, 4, 2, 3]].copy()
    asked[2] = 0.8 * IMAGES[2] + 0.6 * IMAGES[3]  # q3 nearly finds its own
    asked[3] = 0.9 * IMAGES[3] + 0.3 * IMAGES[4] + 0.2 * IMAGES[5] + 0.1 * IMAGES[2]  # q2 does not at all
    found = hard_retrievals(TRACK, asked, IMAGES, count=3, k=2)
    assert [one.query for one in found] == ["q2", "q3"], "what succeeds is not hard"
    assert (found[0].wanted.image, found[0].rank) == (2, 4)
    assert (found[1].wanted.image, found[1].rank) == (3, 2)
    assert found[0].margin > found[1].margin > 0
    assert [one.answers[0].image for one in found] == [3, 2]
    assert hard_retrievals(TRACK, asked, IMAGES, count=1)[0].query == "q2"


def test_where_all_score_alike_a_failure_has_the_rank_that_its_place_gives_it() -> None:
    alike = np.full((6, 6), 6**-0.5, np.float32)
    found = hard_retrievals(TRACK, alike[:4], alike, k=2)
    assert {one.query: one.rank for one in found} == {"q3": 2, "q2": 3, "q4": 4}, "not the first, which is q5"
    assert all(one.margin == pytest.approx(0.0, abs=1e-6) for one in found)
