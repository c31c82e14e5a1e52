"""If these fail, an export or an engine that answers differently passes as the same."""

from __future__ import annotations

import numpy as np
import pytest

from edgeglm.evaluate.parity import cosine_rows, parity


def test_equal_arrays_are_at_parity() -> None:
    array = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    found = parity(array, array.copy())
    assert found.max_abs == 0
    assert found.min_cosine == pytest.approx(1)
    assert found.rows == 3


def test_one_wrong_element_is_found() -> None:
    expected = np.ones((4, 8), np.float32)
    actual = expected.copy()
    actual[2, 3] += 0.5
    assert parity(actual, expected).max_abs == 0.5


def test_a_turned_row_is_found_by_its_cosine_though_the_mean_is_high() -> None:
    expected = np.tile(np.array([1, 0], np.float32), (100, 1))
    actual = expected.copy()
    actual[7] = (0, 1)
    found = parity(actual, expected)
    assert found.mean_cosine > 0.98
    assert found.min_cosine == 0
    assert np.flatnonzero(cosine_rows(actual, expected) != 1).tolist() == [7]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_tower_that_is_not_finite_is_never_at_parity(bad: float) -> None:
    expected = np.ones((2, 2), np.float32)
    actual = expected.copy()
    actual[0, 0] = bad
    for other in (expected, actual):
        found = parity(actual, other)
        assert not found.max_abs <= 1e9
        assert not found.min_cosine >= -1


def test_half_precision_is_compared_without_overflow() -> None:
    large = np.full((1, 1000), 60000, np.float16)
    assert cosine_rows(large, large) == pytest.approx(1)


def test_a_row_of_zeros_has_no_cosine() -> None:
    zeros = np.zeros((1, 3), np.float32)
    assert np.isnan(cosine_rows(zeros, zeros)).all()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot compare shapes"):
        parity(np.ones((2, 3)), np.ones((2, 4)))
