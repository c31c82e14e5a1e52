"""If these fail, a metric is not what its name says, or one category's failures hide behind another's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.evaluate.evaluator import (
    ClassificationTask,
    RetrievalTask,
    evaluated,
    told_by_centroid,
    told_by_prompt,
)
from edgeglm.evaluate.measures import DEFAULT, accuracy, macro_f1, measures_of, resampled
from edgeglm.evaluate.retrieval import evaluate_track
from tests.evaluate.test_retrieval import random_relevance, runs_of, unit


@pytest.mark.parametrize(("seed", "most"), [(3, 1), (4, 4), (5, 25)])
@pytest.mark.parametrize("k", [1, 3, 10, 37])
def test_ranked_metrics_of_any_cutoff_agree_with_trec_eval(seed: int, most: int, k: int) -> None:
    import ir_measures
    from ir_measures import AP, RR, R, Success

    rng = np.random.default_rng(seed)
    queries, gallery = unit(rng, 40), unit(rng, 60)
    relevant = random_relevance(rng, 40, 60, most)
    task = RetrievalTask(name="one", query_QD=queries, gallery_GD=gallery, relevant=relevant)
    found = evaluated([task], [], measures_of(f"map@{k},recall@{k},hit@{k},mrr@{k}"), resamples=0)
    qrels, run = runs_of(queries, gallery, relevant)
    theirs = ir_measures.calc_aggregate([AP @ k, R @ k, Success @ k, RR @ k], qrels, run)
    assert [figure.all.value for figure in found] == pytest.approx(
        [theirs[each] for each in (AP @ k, R @ k, Success @ k, RR @ k)], abs=1e-9
    )
    if k == 10:
        old = evaluate_track(queries, gallery, relevant, bootstrap=0)
        assert found[0].all.value == pytest.approx(old.map10.value)
        assert found[2].all.value == pytest.approx(old.r10)


def by_definition(true: list[int], told: list[int]) -> tuple[float, float]:
    """Accuracy and macro-F1 from precision and recall, class by class, as scikit-learn defines them."""
    scores = []
    for one in sorted({*true, *told}):
        hits = sum(a == b == one for a, b in zip(true, told, strict=True))
        precision = hits / told.count(one) if one in told else 0.0
        recall = hits / true.count(one) if one in true else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    right = sum(a == b for a, b in zip(true, told, strict=True)) / len(true)
    return right, sum(scores) / len(scores)


LABELS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60)


@settings(deadline=None)
@given(rows=LABELS)
def test_accuracy_and_macro_f1_are_those_of_their_definitions(rows: list[tuple[int, int]]) -> None:
    true, told = ([row[side] for row in rows] for side in (0, 1))
    expected = by_definition(true, told)
    assert accuracy(np.array(true), np.array(told)) == pytest.approx(expected[0])
    assert macro_f1(np.array(true), np.array(told)) == pytest.approx(expected[1])


def test_macro_f1_of_a_worked_example() -> None:
    # The example of scikit-learn's f1_score(..., average="macro"), which gives 0.26...
    assert macro_f1(np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 1])) == pytest.approx(0.8 / 3)


def two_tasks() -> list[RetrievalTask]:
    """One of two queries, all right; one of eight, of which the six of category "b" are wrong."""
    eye = np.eye(10, dtype=np.float32)
    easy = RetrievalTask(
        name="easy", query_QD=eye[:2], gallery_GD=eye, relevant=[[0], [1]], category_Q=("a", "a")
    )
    wrong = [[0], [1], *([9 - place] for place in range(2, 8))]
    hard = RetrievalTask(
        name="hard", query_QD=eye[:8], gallery_GD=eye, relevant=wrong, category_Q=("a", "", *"bbbbbb")
    )
    return [easy, hard]


def test_every_task_counts_the_same_and_every_category_stands_by_itself() -> None:
    (hit,) = evaluated(two_tasks(), [], measures_of("hit@1"))
    assert hit.tasks["easy"].value == 1.0
    assert hit.tasks["hard"].value == 0.25
    assert hit.all.value == pytest.approx((1.0 + 0.25) / 2)
    assert hit.categories["a"].value == 1.0
    assert hit.categories["b"].value == 0.0
    assert hit.counts == {"a": 3, "b": 6}
    assert hit.all.low < hit.all.value < hit.all.high
    assert (hit.tasks["easy"].low, hit.tasks["easy"].high) == (1.0, 1.0)


def test_an_interval_holds_what_other_draws_would_give() -> None:
    rng, inside = np.random.default_rng(0), 0
    for seed in range(100):
        drawn = [(rng.random(40) < 0.6).astype(float), (rng.random(60) < 0.2).astype(float)]
        found = resampled([(row,) for row in drawn], lambda v: float(v.mean()), resamples=200, seed=seed)
        inside += found.low <= 0.4 <= found.high
    assert 88 <= inside <= 100


def test_categories_are_told_by_prompts_and_by_the_others_mean() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8, dtype=np.float32)
    true = np.repeat(np.arange(3), 10)
    items = centres[true] + 0.1 * rng.standard_normal((30, 8)).astype(np.float32)
    assert told_by_prompt(items, centres).tolist() == true.tolist()
    assert told_by_centroid(items, true).tolist() == true.tolist()
    # An item never helps to tell itself: alone in its class, it is told another.
    alone = np.concatenate([true, [3]])
    lonely = np.concatenate([items, -centres[:1]])
    assert told_by_centroid(lonely, alone)[-1] != 3
    task = ClassificationTask(name="t", true_N=true, told_N=np.where(true == 2, 0, true), classes=list("abc"))
    right, f1 = evaluated([], [task], measures_of("accuracy,macro-f1"))
    assert right.all.value == pytest.approx(2 / 3)
    assert f1.all.value == pytest.approx((2 * 10 / 30 + 1 + 0) / 3)
    assert {one: value.value for one, value in right.categories.items()} == {"a": 1.0, "b": 1.0, "c": 0.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("map", "write map@10"),
        ("map@0", "write map@10"),
        ("recal@5", "known: .*recall@k"),
        ("accuracy@5", "unknown metric"),
        (" , ", "no metric is named"),
    ],
)
def test_a_metric_that_is_none_is_refused_with_what_there_is(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        measures_of(text)


def test_metrics_without_anything_to_judge_say_what_is_missing() -> None:
    with pytest.raises(UserError, match="give the pairs the key category"):
        evaluated(two_tasks(), [], measures_of("macro-f1"))
    with pytest.raises(UserError, match="give pairs with texts"):
        evaluated([], [], measures_of("map@5"))
    assert [one.name for one in measures_of(",".join(DEFAULT) + ",MAP@10")] == list(DEFAULT)
