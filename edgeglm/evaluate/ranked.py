"""AP@10 of an order that is no order of cosines, as a re-ranker's is; the definition is ``retrieval``'s."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from edgeglm.evaluate.retrieval import CUTOFF


def average_precision(order: Sequence[int], relevant: Collection[int]) -> float:
    """Return AP@10 of gallery positions, the best first. Raises ValueError where nothing is relevant."""
    if not relevant:
        raise ValueError("no item is relevant")
    right, total = 0, 0.0
    for rank, item in enumerate(order[:CUTOFF], start=1):
        if item in relevant:
            right += 1
            total += right / rank
    return total / len(relevant)
