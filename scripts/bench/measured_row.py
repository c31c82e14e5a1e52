"""A line of a page of figures: the median of its rounds, held against what is aimed at; and an interval."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def measured_row(
    name: str,
    unit: str,
    values: Sequence[float],
    reach: float | None,
    beyond: float | None,
    note: str,
    **more: Any,
) -> Row:
    """Return one line; of ``ratio`` the more the better, of any other unit the less.

    A line without ``reach`` is there to compare with, and has no result.
    """
    value = statistics.median(values)
    return {
        "name": name,
        "unit": unit,
        "value": round(value, 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
        "rounds": len(values),
        **more,
        "reach": reach,
        "beyond": beyond,
        "result": _result(value, unit, reach, beyond),
        "note": note,
    }


def _result(value: float, unit: str, reach: float | None, beyond: float | None) -> str:
    if reach is None or beyond is None:
        return "to compare with"
    sign = 1 if unit == "ratio" else -1
    if sign * value >= sign * beyond:
        return "beyond"
    return "reached" if sign * value >= sign * reach else "falls short"


def interval_words(interval: Mapping[str, float]) -> str:
    """Return a figure with its interval: ``0.778 (0.752 to 0.803)``."""
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
