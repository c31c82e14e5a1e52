"""Histograms of durations, cheap enough for every call."""

from __future__ import annotations

from bisect import bisect_left

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Times:
    """Counts of durations, one a bound of ``SECONDS`` (up to and including it) and one for the rest."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def add(self, other: Times) -> None:
        """Count all that another one counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


StageTimes = dict[tuple[str, str], Times]


def added(total: StageTimes, more: StageTimes) -> None:
    """Add ``more`` to ``total``, key by key."""
    for key, times in more.items():
        total.setdefault(key, Times()).add(times)
