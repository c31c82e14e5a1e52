"""If these fail, an export or an engine that answers differently passes as the same."""

from __future__ import annotations

import numpy as np
import pytest

from edgeglm.core.errors import GateError
from edgeglm.evaluate.parity import cosine_rows, parity, require_cosine, require_parity


def test_equal_arrays_are_at_parity() -> None:
    array = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    found = require_parity("image tower", array, array.copy(), atol=0.0, remedy="-")
    assert found.max_abs == 0
    assert found.min_cosine == pytest.approx(1)
    assert found.rows == 3


def test_one_wrong_element_is_found_and_the_remedy_said() -> None:
    expected = np.ones((4, 8), np.float32)
    actual = expected.copy()
    actual[2, 3] += 0.5
    with pytest.raises(GateError, match=r"image tower differs by up to 0\.5 over 4 rows .*; lower the opset"):
        require_parity("image tower", actual, expected, atol=1e-4, remedy="lower the opset")


def test_a_turned_row_is_found_by_its_cosine_though_the_mean_is_high() -> None:
    expected = np.tile(np.array([1, 0], np.float32), (100, 1))
    actual = expected.copy()
    actual[7] = (0, 1)
    assert parity(actual, expected).mean_cosine > 0.98
    with pytest.raises(GateError, match=r"worst of 100 rows of text tower has cosine 0\.0"):
        require_cosine("text tower", actual, expected, minimum=0.99, remedy="keep it in FP32")
    assert require_cosine("text tower", expected, expected, minimum=0.99, remedy="-").min_cosine == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_tower_that_is_not_finite_is_never_at_parity(bad: float) -> None:
    expected = np.ones((2, 2), np.float32)
    actual = expected.copy()
    actual[0, 0] = bad
    with pytest.raises(GateError):
        require_parity("x", actual, expected, atol=1e9, remedy="-")
    with pytest.raises(GateError):
        require_parity("x", actual, actual, atol=1e9, remedy="-")
    with pytest.raises(GateError):
        require_cosine("x", actual, expected, minimum=-1, remedy="-")


def test_half_precision_is_compared_without_overflow() -> None:
    large = np.full((1, 1000), 60000, np.float16)
    assert cosine_rows(large, large) == pytest.approx(1)


def test_a_row_of_zeros_has_no_cosine() -> None:
    zeros = np.zeros((1, 3), np.float32)
    assert np.isnan(cosine_rows(zeros, zeros)).all()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot compare shapes"):
        parity(np.ones((2, 3)), np.ones((2, 4)))
