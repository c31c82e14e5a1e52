"""Metrics by name: ``map@10``, ``recall@5``, ``hit@1``, ``mrr@10``, ``accuracy``, ``macro-f1``.

For a query with R relevant items, of which H are among the first k:

* ``map@k`` is trec_eval's ``map_cut.k``: the precision at each of the H, summed, divided by R.
* ``recall@k`` is trec_eval's ``recall.k``: H / R. With one relevant item it equals ``hit@k``.
* ``hit@k`` is trec_eval's ``success.k``, which the cross-modal literature calls R@k: whether H > 0.
* ``mrr@k`` is 1 / the rank of the first of the H, 0 if there is none.

``accuracy`` is the share of items whose class was told rightly; ``macro-f1`` the mean of F1 over the classes
that occur or are told (scikit-learn's ``average="macro"``), 0 for one that is never told rightly.

Shapes: Q queries, K items ranked, N classified items.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.evaluate.retrieval import Interval

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

RANKED = ("map", "recall", "hit", "mrr")
CLASSIFIED = ("accuracy", "macro-f1")
DEFAULT = ("map@10", "recall@1", "recall@10", "mrr@10")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric. ``cutoff`` is 0 for those of a classification."""

    kind: str
    cutoff: int = 0

    @property
    def name(self) -> str:
        """Its name as it is asked for."""
        return f"{self.kind}@{self.cutoff}" if self.cutoff else self.kind


def measures_of(text: str) -> tuple[Measure, ...]:
    """Read names with commas between them, each once. Raises UserError for an unknown one."""
    found: dict[str, Measure] = {}
    for name in filter(None, (part.strip().lower() for part in text.split(","))):
        kind, _, cutoff = name.partition("@")
        if kind in CLASSIFIED and not cutoff:
            found[name] = Measure(kind=kind)
        elif kind in RANKED and re.fullmatch(r"[1-9]\d{0,5}", cutoff):
            found[f"{kind}@{int(cutoff)}"] = Measure(kind=kind, cutoff=int(cutoff))
        elif kind in RANKED:
            raise UserError(f"the metric {name!r} lacks its cutoff; write {kind}@10")
        else:
            raise unknown_name("metric", name, (*(f"{kind}@k" for kind in RANKED), *CLASSIFIED))
    if not found:
        raise UserError(f"no metric is named; give some of {', '.join((*DEFAULT, *CLASSIFIED))}")
    return tuple(found.values())


def ranked_values(measure: Measure, hits_QK: npt.NDArray[np.bool_], relevant_Q: Labels) -> Values:
    """Return the metric of each query, float64 [Q].

    Args:
        measure: One of those with a cutoff.
        hits_QK: Whether each item is relevant, best first; with fewer than ``cutoff`` items, all there are.
        relevant_Q: R of each query, at least 1.
    """
    hits = hits_QK[:, : measure.cutoff]
    ranks = np.arange(1, hits.shape[1] + 1)
    found: Values
    if measure.kind == "map":
        found = np.asarray((np.cumsum(hits, axis=1) / ranks * hits).sum(axis=1) / relevant_Q)
    elif measure.kind == "recall":
        found = np.asarray(hits.sum(axis=1) / relevant_Q)
    elif measure.kind == "hit":
        found = np.asarray(hits.any(axis=1), dtype=np.float64)
    else:
        found = np.where(hits.any(axis=1), 1.0 / (1 + hits.argmax(axis=1)), 0.0)
    return found


def accuracy(true_N: Labels, told_N: Labels) -> float:
    """Return the share that was told rightly."""
    return float((true_N == told_N).mean())


def macro_f1(true_N: Labels, told_N: Labels) -> float:
    """Return the mean over classes, that occur or are told, of 2 TP / (2 TP + FP + FN)."""
    count = int(max(true_N.max(), told_N.max())) + 1
    right = np.bincount(true_N[true_N == told_N], minlength=count)
    all_of = np.bincount(true_N, minlength=count) + np.bincount(told_N, minlength=count)
    seen = all_of > 0
    return float((2 * right[seen] / all_of[seen]).mean())


CLASSIFICATIONS: dict[str, Callable[[Labels, Labels], float]] = {"accuracy": accuracy, "macro-f1": macro_f1}


def resampled(
    parts: Sequence[Sequence[npt.NDArray[Any]]],
    value_of: Callable[..., float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return the mean of a figure over tasks with its 95 % bootstrap interval (percentile; Efron, 1979).

    Every task counts the same, however large; each is resampled by itself.

    Args:
        parts: For each task the rows that the figure is computed from: arrays of one length.
        value_of: Rows of one task -> its figure.
        resamples: How many.
        seed: The same seed gives the same interval.
    """
    value = float(np.mean([value_of(*rows) for rows in parts]))
    if resamples <= 0:
        return Interval(value=value, low=value, high=value)
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for rows in parts:
        size = len(rows[0])
        for turn in range(resamples):
            drawn = rng.integers(0, size, size)
            means[turn] += value_of(*(row[drawn] for row in rows))
    low, high = np.percentile(means / len(parts), (2.5, 97.5))
    return Interval(value=value, low=float(low), high=float(high))
