"""If these fail, a reported accuracy is not what it says it is."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeglm.core.errors import EdgeglmError
from edgeglm.evaluate.retrieval import (
    TrackMetrics,
    average_precisions,
    evaluate_track,
    evaluate_tracks,
    ratio_of_means,
    top_k,
)

Floats = npt.NDArray[np.float32]


def unit(rng: np.random.Generator, n: int, d: int = 16) -> Floats:
    rows: Floats = rng.standard_normal((n, d)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def random_relevance(rng: np.random.Generator, queries: int, gallery: int, most: int) -> list[list[int]]:
    return [
        sorted(rng.choice(gallery, size=rng.integers(1, most + 1), replace=False).tolist())
        for _ in range(queries)
    ]


def runs_of(queries: Floats, gallery: Floats, relevant: list[list[int]]) -> tuple[dict, dict]:  # type: ignore[type-arg]
    scores = queries @ gallery.T
    assert all(len(np.unique(row)) == len(row) for row in scores), "the reference must not see ties"
    qrels = {f"q{q}": {f"d{d}": 1 for d in items} for q, items in enumerate(relevant)}
    run = {f"q{q}": {f"d{d}": float(s) for d, s in enumerate(row)} for q, row in enumerate(scores)}
    return qrels, run


@pytest.mark.parametrize(("seed", "most"), [(3, 1), (4, 4), (5, 25)])
def test_figures_agree_with_trec_eval_in_both_directions(seed: int, most: int) -> None:
    import ir_measures
    from ir_measures import AP, RR, Success

    rng = np.random.default_rng(seed)
    queries, gallery = unit(rng, 40), unit(rng, 60)
    relevant = random_relevance(rng, 40, 60, most)
    ours = evaluate_track(queries, gallery, relevant)

    qrels, run = runs_of(queries, gallery, relevant)
    expected = ir_measures.calc_aggregate([AP @ 10, RR @ 10, Success @ 1, Success @ 10], qrels, run)
    assert ours.map10.value == pytest.approx(expected[AP @ 10], abs=1e-9)
    assert ours.r1 == pytest.approx(expected[Success @ 1], abs=1e-9)
    assert ours.r10 == pytest.approx(expected[Success @ 10], abs=1e-9)
    if most == 1:
        assert ours.map10.value == pytest.approx(expected[RR @ 10], abs=1e-9)

    texts_of = [[q for q, items in enumerate(relevant) if d in items] for d in range(60)]
    answered = [d for d in range(60) if texts_of[d]]
    qrels, run = runs_of(gallery[answered], queries, [texts_of[d] for d in answered])
    expected = ir_measures.calc_aggregate([Success @ 1, Success @ 10], qrels, run)
    assert ours.r1_i2t == pytest.approx(expected[Success @ 1], abs=1e-9)
    assert ours.r10_i2t == pytest.approx(expected[Success @ 10], abs=1e-9)


@given(seed=st.integers(0, 2**32 - 1), most=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_order_of_queries_and_gallery_changes_no_figure(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    queries, gallery = unit(rng, 15), unit(rng, 20)
    relevant = random_relevance(rng, 15, 20, most)
    order_Q, order_G = rng.permutation(15), rng.permutation(20)
    place = np.argsort(order_G)
    before = evaluate_track(queries, gallery, relevant, bootstrap=0)
    after = evaluate_track(
        queries[order_Q],
        gallery[order_G],
        [[int(place[d]) for d in relevant[q]] for q in order_Q],
        bootstrap=0,
    )
    for field in ("r1", "r10", "r1_i2t", "r10_i2t"):
        assert getattr(after, field) == pytest.approx(getattr(before, field))
    assert after.map10.value == pytest.approx(before.map10.value)


@given(seed=st.integers(0, 2**32 - 1), most=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_every_figure_is_a_rate_and_the_interval_holds_the_mean(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    found = evaluate_track(unit(rng, 12), unit(rng, 20), random_relevance(rng, 12, 20, most), bootstrap=200)
    for rate in (found.map10.value, found.r1, found.r10, found.r1_i2t, found.r10_i2t):
        assert 0 <= rate <= 1
    assert found.map10.low <= found.map10.value <= found.map10.high
    assert found.r1 <= found.r10
    assert found.r1_i2t <= found.r10_i2t


@given(seed=st.integers(0, 2**32 - 1), copies=st.integers(1, 15))
@settings(max_examples=30, deadline=None)
def test_a_perfect_ranking_is_perfect(seed: int, copies: int) -> None:
    """Above 10 relevant items the ceiling of map_cut.10 is 10 / R, as in trec_eval."""
    queries = np.eye(6, dtype=np.float32)
    noise = np.random.default_rng(seed).uniform(0, 1e-3, (6 * copies, 6)).astype(np.float32)
    gallery = np.repeat(queries, copies, axis=0) + noise
    relevant = [list(range(q * copies, (q + 1) * copies)) for q in range(6)]
    found = evaluate_track(queries, gallery, relevant, bootstrap=50)
    ceiling = min(copies, 10) / copies
    assert found.map10.value == pytest.approx(ceiling)
    assert found.map10.low == pytest.approx(ceiling)
    assert (found.r1, found.r10, found.r1_i2t, found.r10_i2t) == (1, 1, 1, 1)


def test_a_collapsed_tower_scores_as_chance_and_not_as_perfect() -> None:
    same = np.ones((100, 4), np.float32) / 2
    found = evaluate_track(same, same, [[i] for i in range(100)])
    assert found.r1 == pytest.approx(0.01)
    assert found.r10 == pytest.approx(0.10)
    assert found.r10_i2t == pytest.approx(0.10)


@pytest.mark.parametrize("side", [0, 1])
def test_a_tower_of_nan_is_refused_and_not_perfect(side: int) -> None:
    arrays = [unit(np.random.default_rng(0), 5), unit(np.random.default_rng(1), 5)]
    arrays[side][2, 1] = np.nan
    with pytest.raises(EdgeglmError, match=r"1 of 5 .* embeddings are not finite"):
        evaluate_track(arrays[0], arrays[1], [[i] for i in range(5)])


def test_ties_keep_the_order_of_the_gallery() -> None:
    query = np.array([[1, 0]], np.float32)
    gallery = np.array([[0, 1], [1, 0], [1, 0], [1, 0]], np.float32)
    positions, scores = top_k(query, gallery, 10)
    assert positions.tolist() == [[1, 2, 3, 0]]
    assert scores.tolist() == [[1, 1, 1, 0]]
    assert evaluate_track(query, gallery, [[3]]).map10.value == pytest.approx(1 / 3)


def test_a_gallery_larger_than_a_block_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    queries, gallery = unit(rng, 50), unit(rng, 70)
    relevant = random_relevance(rng, 50, 70, 9)
    whole, best = evaluate_track(queries, gallery, relevant, bootstrap=0), top_k(queries, gallery, 5)
    monkeypatch.setattr("edgeglm.evaluate.retrieval._BLOCK_ELEMENTS", 200)
    assert evaluate_track(queries, gallery, relevant, bootstrap=0) == whole
    assert np.array_equal(top_k(queries, gallery, 5)[0], best[0])


def test_the_interval_repeats_and_narrows_with_more_queries() -> None:
    rng = np.random.default_rng(0)

    def width(n: int) -> float:
        found = evaluate_track(unit(rng, n, 4), unit(rng, 50, 4), random_relevance(rng, n, 50, 3)).map10
        return found.high - found.low

    assert width(2000) < width(50) / 3
    queries, gallery = unit(rng, 30), unit(rng, 30)
    one = evaluate_track(queries, gallery, [[i] for i in range(30)], seed=3)
    assert one == evaluate_track(queries, gallery, [[i] for i in range(30)], seed=3)


@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        ([[0], [], [2]], "query 1 has no relevant item"),
        ([[0], [5], [2]], "outside of the gallery of 4"),
        ([[0], [-1], [2]], "outside of the gallery of 4"),
        ([[0], [1]], "relevance for 2"),
    ],
)
def test_wrong_relevance_is_refused(relevant: list[list[int]], message: str) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        evaluate_track(unit(rng, 3), unit(rng, 4), relevant)


def test_wrong_shapes_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="8 dimensions"):
        evaluate_track(unit(rng, 1, 8), unit(rng, 1, 9), [[0]])
    with pytest.raises(ValueError, match="n > 0"):
        evaluate_track(unit(rng, 0), unit(rng, 1), [])


@dataclass(frozen=True)
class Query:
    text: str
    relevant: tuple[int, ...]


@dataclass(frozen=True)
class Track:
    name: str
    queries: tuple[Query, ...]
    gallery: tuple[int, ...]


def test_tracks_share_texts_and_map_image_indices_to_gallery_positions() -> None:
    images = np.eye(5, dtype=np.float32)
    row = {"apple": 4, "pear": 2, "fruit": 2}
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> Floats:
        asked.append(texts)
        return images[[row[text] for text in texts]]

    tracks = [
        Track("catalogue", (Query("apple", (4,)), Query("pear", (2,))), (4, 3, 2)),
        Track("unseen", (Query("fruit", (2, 4)), Query("apple", (4,))), (2, 3, 4)),
    ]
    found = evaluate_tracks(tracks, embed, images)
    assert asked == [["apple", "pear", "fruit"]]
    assert found["catalogue"].map10.value == 1
    assert found["catalogue"].gallery == 3
    # "fruit" finds 2 first; 3 and 4 tie at zero, so 4 comes third: (1/1 + 2/3) / 2
    assert found["unseen"].map10.value == pytest.approx((5 / 6 + 1) / 2)


@pytest.mark.parametrize(
    ("track", "message"),
    [
        (Track("a", (Query("x", (1,)),), (0, 2)), "image 1 is relevant in track 'a'"),
        (Track("a", (Query("x", (0,)),), (0, 0)), "repeats an image"),
    ],
)
def test_a_track_that_contradicts_its_gallery_is_refused(track: Track, message: str) -> None:
    images = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        evaluate_tracks([track], lambda texts: images[: len(texts)], images)


def test_metrics_json_has_the_agreed_shape() -> None:
    found = evaluate_track(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), [[0], [1]])
    assert msgspec.json.decode(msgspec.json.encode({"unseen": found})) == {
        "unseen": {
            "map10": {"value": 1.0, "low": 1.0, "high": 1.0},
            "r1": 1.0,
            "r10": 1.0,
            "r1_i2t": 1.0,
            "r10_i2t": 1.0,
            "queries": 2,
            "gallery": 2,
        }
    }
    assert msgspec.json.decode(msgspec.json.encode(found), type=TrackMetrics) == found


def test_a_ratio_pairs_the_queries_and_holds_its_own_value() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.random(500)
    same = ratio_of_means(teacher * 0.9, teacher)
    assert same.value == pytest.approx(0.9)
    assert same.low == pytest.approx(0.9), "what is hard for both is no doubt about the ratio"
    other = ratio_of_means(rng.random(500), teacher)
    assert other.low < other.value < other.high
    assert ratio_of_means(teacher, teacher * 0.5).high == pytest.approx(2.0)
    for student, reference in ((teacher[:9], teacher), (teacher, teacher * 0), (teacher[:0], teacher[:0])):
        with pytest.raises(ValueError, match="equal length and a reference above zero"):
            ratio_of_means(student, reference)


def test_average_precisions_are_what_the_mean_is_of() -> None:
    rng = np.random.default_rng(1)
    queries, gallery = (rng.standard_normal((n, 8)).astype(np.float32) for n in (20, 50))
    relevant = [sorted(rng.choice(50, size=1 + i % 12, replace=False).tolist()) for i in range(20)]
    found = average_precisions(queries, gallery, relevant)
    assert found.shape == (20,)
    assert found.mean() == pytest.approx(evaluate_track(queries, gallery, relevant).map10.value)
