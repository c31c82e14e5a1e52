"""If this fails, a re-ranker is judged by another figure than the towers are."""

from __future__ import annotations

import numpy as np
import pytest

from edgeglm.evaluate.ranked import average_precision
from edgeglm.evaluate.retrieval import average_precisions, top_k


def test_an_order_of_cosines_scores_as_the_towers_do():
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(30, 4)), rng.normal(size=(40, 4))
    relevant = [rng.choice(40, size=int(rng.integers(1, 14)), replace=False).tolist() for _ in range(30)]
    orders, _ = top_k(queries, gallery, 25)
    found = [average_precision(order.tolist(), set(own)) for order, own in zip(orders, relevant, strict=True)]
    np.testing.assert_allclose(found, average_precisions(queries, gallery, relevant))


def test_a_query_with_nothing_relevant_is_no_score():
    with pytest.raises(ValueError, match="relevant"):
        average_precision([1, 2], set())
