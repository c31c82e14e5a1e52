"""Parity: how far two arrays that ought to be equal are apart."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]


class Parity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The distance between two arrays of embeddings, rows compared one by one.

    Attributes:
        max_abs: The largest absolute difference of two elements; NaN if either array has one.
        mean_cosine: The mean cosine of two rows.
        min_cosine: The cosine of the worst row.
        rows: How many rows were compared.
    """

    max_abs: float
    mean_cosine: float
    min_cosine: float
    rows: int


def cosine_rows(actual: FloatArray, expected: FloatArray) -> npt.NDArray[np.float64]:
    """Return the cosine of each row, float64 [n], of two arrays [n, ...]; NaN where a row is all zero."""
    left, right = _rows(actual), _rows(expected)
    with np.errstate(invalid="ignore"):  # infinities become NaN, which no comparison passes
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        dots = np.einsum("nd,nd->n", left, right)
        cosines = np.full(len(dots), np.nan)
        np.divide(dots, norms, out=cosines, where=norms > 0)
    return cosines


def parity(actual: FloatArray, expected: FloatArray) -> Parity:
    """Measure two arrays of one shape [n, ...]. Raises ValueError if the shapes differ or n is 0."""
    if actual.shape != expected.shape or len(actual) == 0:
        raise ValueError(f"cannot compare shapes {actual.shape} and {expected.shape}")
    cosines = cosine_rows(actual, expected)
    with np.errstate(invalid="ignore"):
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    return Parity(
        max_abs=float(difference.max()),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        rows=len(actual),
    )


def _rows(array: FloatArray) -> npt.NDArray[np.float64]:
    return array.reshape(len(array), -1).astype(np.float64)
