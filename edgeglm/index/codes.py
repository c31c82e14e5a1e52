"""Small codes of embeddings that can be searched fast: one byte or one bit a dimension.

N rows, D dimensions. All rows are L2-normalised before they are coded.

- int8: components times a scale, rounded and kept as bytes from 1 to 255 (zero is 128), compared by their
  inner product. The scale is one for all rows, or inner products could not be compared; it makes the
  largest component of a generation 127, and clips larger ones that come later.
- binary: on which side of the rows' mean each component lies, packed, compared by the number of bits that
  differ. The mean matters: towers put their rows into a cone, in which plain signs tell little. The share of
  differing signs estimates the angle (Charikar, "Similarity Estimation Techniques from Rounding
  Algorithms", 2002).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatRows = npt.NDArray[np.float32]
FloatRow = npt.NDArray[np.float32]
HalfRows = npt.NDArray[np.float16]
ByteRows = npt.NDArray[np.uint8]

_ZERO = 128.0
_LEVELS = 127.0


def unit_rows(rows_ND: FloatRows) -> FloatRows:
    """Return float32 [N, D] of length 1. Raises ValueError for a row of zeros, NaN or infinity."""
    rows = np.atleast_2d(np.asarray(rows_ND, dtype=np.float32))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError("an embedding is zero, NaN or infinite; look at the picture or text it is of")
    return np.ascontiguousarray(rows / lengths, dtype=np.float32)


def int8_scale(rows_ND: HalfRows) -> float:
    """Return the scale that makes the largest component 127; for no rows, one that suits most embeddings."""
    largest = float(np.abs(rows_ND).max(initial=0))
    if largest == 0:
        largest = min(1.0, 8.0 / float(np.sqrt(rows_ND.shape[1])))  # eight standard deviations
    return _LEVELS / largest


def centre_of(rows_ND: HalfRows) -> FloatRow:
    """Return the mean row, float32 [D]; zeros for no rows."""
    if not len(rows_ND):
        return np.zeros(rows_ND.shape[1], np.float32)
    return np.asarray(rows_ND.mean(axis=0, dtype=np.float32))


def int8_codes(rows_ND: FloatRows, scale: float) -> ByteRows:
    """Return uint8 [N, D], 128 for zero."""
    levels = np.rint(rows_ND * np.float32(scale))
    codes: ByteRows = (np.clip(levels, -_LEVELS, _LEVELS) + _ZERO).astype(np.uint8)
    return codes


def binary_codes(rows_ND: FloatRows, centre_D: FloatRow) -> ByteRows:
    """Return uint8 [N, ceil(D / 8)]."""
    return np.packbits(rows_ND > centre_D, axis=1)
