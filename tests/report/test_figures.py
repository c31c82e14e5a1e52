"""If these fail, a reader misreads a number."""

from __future__ import annotations

import pytest

from edgeglm.report import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3_400_000, "3.4 MB"),
        (999_900, "1.0 MB"),
        (107_000_000, "107 MB"),
    ],
)
def test_sizes(value: int, text: str) -> None:
    assert figures.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (812, "812"),
        (1_500, "2 k"),
        (999_400, "999 k"),
        (999_600, "1.0 M"),
        (26_400_000, "26.4 M"),
        (110e6, "110 M"),
    ],
)
def test_counts(value: int, text: str) -> None:
    assert figures.count(int(value)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.82, "0.82"), (9.876, "9.88"), (14.31, "14.3"), (110.4, "110")]
)
def test_milliseconds(value: float, text: str) -> None:
    assert figures.milliseconds(value) == text


def test_what_was_not_measured_is_a_dash_and_not_zero() -> None:
    absent = [f(None) for f in (figures.rate, figures.percent, figures.times, figures.milliseconds)]
    assert {*absent, figures.size(None), figures.count(None)} == {"\u2013"}
