"""The one evaluator: embeddings and what is right, in; named metrics with intervals and by category, out.

A *task* is a set of queries over one gallery, or items to classify, from one source. Over several tasks a
figure is the mean of theirs, each counting the same.

Shapes: Q queries, G gallery items, N items, C classes, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError
from edgeglm.evaluate.measures import CLASSIFICATIONS, Measure, ranked_values, resampled
from edgeglm.evaluate.retrieval import FloatArray, Interval, top_k

Classifier = Literal["prompt", "centroid"]


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """Queries over a gallery.

    Attributes:
        name: Its key.
        query_QD: float32 [Q, D], L2-normalised.
        gallery_GD: float32 [G, D], L2-normalised.
        relevant: For each query the positions in the gallery that answer it, at least one.
        category_Q: What each query belongs to; "" where that is not known.
    """

    name: str
    query_QD: FloatArray
    gallery_GD: FloatArray
    relevant: Sequence[Sequence[int]]
    category_Q: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class ClassificationTask:
    """Items whose class was told.

    Attributes:
        name: Its key.
        true_N: int64, the class of each item.
        told_N: int64, what was told.
        classes: Their names.
    """

    name: str
    true_N: npt.NDArray[np.int64]
    told_N: npt.NDArray[np.int64]
    classes: Sequence[str]


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One metric: over all tasks, by task, and by category; ``counts`` of each category."""

    metric: str
    all: Interval
    tasks: dict[str, Interval]
    categories: dict[str, Interval]
    counts: dict[str, int]


def evaluated(
    retrieval: Sequence[RetrievalTask],
    classification: Sequence[ClassificationTask],
    measures: Sequence[Measure],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Figure, ...]:
    """Return every figure that is asked for.

    Raises:
        UserError: A metric has no task that it could be computed on.
        UnusableEmbeddingsError: An embedding is NaN or infinite.
    """
    deepest = max((measure.cutoff for measure in measures), default=0)
    hits = {task.name: _hits(task, deepest) for task in retrieval if deepest}
    found = []
    for measure in measures:
        if measure.cutoff:
            if not retrieval:
                raise UserError(f"nothing is asked that {measure.name} could judge; give pairs with texts")
            rows = {
                task.name: (ranked_values(measure, *hits[task.name]), np.asarray(task.category_Q, dtype=str))
                for task in retrieval
            }
            found.append(_figure(measure.name, rows, resamples, seed))
            continue
        if not classification:
            raise UserError(
                f"no item has a class for {measure.name} to judge; give the pairs the key category, or "
                "subcategory where figures are broken down by that"
            )
        value_of, by_task = CLASSIFICATIONS[measure.kind], {}
        for task in classification:
            by_task[task.name] = resampled(
                [(task.true_N, task.told_N)], value_of, resamples=resamples, seed=seed
            )
        whole = resampled(
            [(task.true_N, task.told_N) for task in classification], value_of, resamples=resamples, seed=seed
        )
        recalls, counts = _recalls(classification, resamples, seed)
        found.append(Figure(metric=measure.name, all=whole, tasks=by_task, categories=recalls, counts=counts))
    return tuple(found)


def _hits(task: RetrievalTask, deepest: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    places_QK, _ = top_k(task.query_QD, task.gallery_GD, deepest)
    distinct = [set(items) for items in task.relevant]
    if not all(distinct):
        raise ValueError(f"a query of {task.name} has nothing relevant")
    hits = np.array([[p in right for p in row] for row, right in zip(places_QK, distinct, strict=True)])
    return hits, np.array([len(right) for right in distinct], dtype=np.int64)


def _figure(
    name: str,
    rows: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.str_]]],
    resamples: int,
    seed: int,
) -> Figure:
    def mean(values: npt.NDArray[np.float64]) -> float:
        return float(values.mean())

    def interval(parts: Sequence[npt.NDArray[np.float64]]) -> Interval:
        return resampled([(part,) for part in parts], mean, resamples=resamples, seed=seed)

    by_category: dict[str, list[npt.NDArray[np.float64]]] = {}
    for values, category in rows.values():
        for one in sorted(set(category.tolist()) - {""}):
            by_category.setdefault(one, []).append(values[category == one])
    return Figure(
        metric=name,
        all=interval([values for values, _ in rows.values()]),
        tasks={task: interval([values]) for task, (values, _) in rows.items()},
        categories={one: interval(parts) for one, parts in sorted(by_category.items())},
        counts={one: sum(map(len, parts)) for one, parts in sorted(by_category.items())},
    )


def _recalls(
    tasks: Sequence[ClassificationTask], resamples: int, seed: int
) -> tuple[dict[str, Interval], dict[str, int]]:
    """Return the share of each class that was told rightly: both metrics by class."""
    rows: dict[str, list[npt.NDArray[np.float64]]] = {}
    for task in tasks:
        for place in np.unique(task.true_N).tolist():
            right = (task.told_N == place)[task.true_N == place].astype(np.float64)
            rows.setdefault(task.classes[place], []).append(right)
    figure = {
        one: resampled([(part,) for part in parts], lambda v: float(v.mean()), resamples=resamples, seed=seed)
        for one, parts in sorted(rows.items())
    }
    return figure, {one: sum(map(len, rows[one])) for one in figure}


def told_by_prompt(item_ND: FloatArray, prompt_CD: FloatArray) -> npt.NDArray[np.int64]:
    """Tell the class whose prompt is nearest (zero-shot; Radford et al., CLIP, 2021): int64 [N]."""
    return np.asarray((item_ND @ prompt_CD.T).argmax(axis=1), dtype=np.int64)


def told_by_centroid(item_ND: FloatArray, true_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Tell the class whose mean is nearest, every item left out of its own class's mean: int64 [N].

    The only item of a class has no class left to be told rightly.
    """
    count = int(true_N.max()) + 1
    sums_CD = np.zeros((count, item_ND.shape[1]))
    np.add.at(sums_CD, true_N, item_ND)
    told = np.empty(len(item_ND), dtype=np.int64)
    for n, row in enumerate(item_ND):
        own = sums_CD.copy()
        own[true_N[n]] -= row
        lengths = np.linalg.norm(own, axis=1)
        alone = np.bincount(true_N, minlength=count)[true_N[n]] == 1
        scores = np.where(lengths > 0, own @ row / np.maximum(lengths, 1e-12), -np.inf)
        if alone:
            scores[true_N[n]] = -np.inf
        told[n] = int(scores.argmax())
    return told
