"""Retrieval metrics over cross-modal tracks, in numpy only.

Definitions, for a query q with R relevant gallery items:

* **AP@10** is trec_eval's ``map_cut.10``: the sum, over the relevant items ranked 10th or better,
  of (relevant items ranked there or before) / rank, divided by *all* R relevant items. With R > 10
  even a perfect ranking reaches only 10 / R. mAP@10 is its mean over queries.
  **With one relevant image a query, mAP@10 equals MRR@10**; say so wherever such a figure is quoted.
* **R@k** is the share of queries with at least one right item among the first k, as the
  cross-modal literature uses the name (trec_eval's ``success.k``).
* **image -> text** takes every gallery item that is relevant to some query and ranks all query
  texts for it; what counts is the rank of its first right text.

The score is the plain dot product, as on the device: towers give L2-normalised embeddings. Equal
scores rank by index, so a tower that answers the same for everything scores as chance, not as
perfect; and non-finite embeddings are refused, since every comparison with NaN is false.

Shapes: Q queries, G gallery items, D embedding size, K = 10, P relevant (query, item) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import EdgeglmError

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

CUTOFF = 10
ONE_RELEVANT_NOTE = "With one relevant image a query, mAP@10 equals MRR@10."

_BLOCK_ELEMENTS = 1 << 22  # scores compared at once: 16 MiB of float32


class UnusableEmbeddingsError(EdgeglmError):
    """Embeddings that cannot be ranked: NaN or infinite. A candidate that makes them has failed."""


class Interval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mean, or a ratio of two, with the bounds of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class TrackMetrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one track says about a pair of towers. Rates are in [0, 1]; definitions in the module.

    Attributes:
        map10: mAP@10, text -> image, with its interval over queries.
        r1: R@1, text -> image.
        r10: R@10, text -> image.
        r1_i2t: R@1, image -> text.
        r10_i2t: R@10, image -> text.
        queries: How many queries were asked.
        gallery: How many images they were asked of.
    """

    map10: Interval
    r1: float
    r10: float
    r1_i2t: float
    r10_i2t: float
    queries: int
    gallery: int


class QueryLike(Protocol):
    """A text and the indices of the images that answer it."""

    @property
    def text(self) -> str:
        """The query as a user would type it."""

    @property
    def relevant(self) -> Sequence[int]:
        """Indices into all images; every one must be in the track's gallery."""


class TrackLike(Protocol):
    """A named set of queries over one gallery."""

    @property
    def name(self) -> str:
        """The track's key in the metrics."""

    @property
    def queries(self) -> Sequence[QueryLike]:
        """The queries."""

    @property
    def gallery(self) -> Sequence[int]:
        """Indices into all images."""


def evaluate_track(
    query_embeddings: FloatArray,
    gallery_embeddings: FloatArray,
    relevant: Sequence[Sequence[int]],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> TrackMetrics:
    """Return the metrics of one track.

    Args:
        query_embeddings: float32 [Q, D], L2-normalised.
        gallery_embeddings: float32 [G, D], L2-normalised.
        relevant: For each query the positions in the gallery (not image indices) that answer it.
        bootstrap: Resamples of the queries behind the interval (percentile method, Efron 1979).
        seed: Seed of the resampling; the same seed gives the same interval.

    Raises:
        UnusableEmbeddingsError: An embedding is NaN or infinite.
        ValueError: Shapes disagree, a query has no relevant item, or a position is out of range.
    """
    return _evaluated(query_embeddings, gallery_embeddings, relevant, bootstrap=bootstrap, seed=seed)[0]


def _evaluated(
    query_embeddings: FloatArray,
    gallery_embeddings: FloatArray,
    relevant: Sequence[Sequence[int]],
    *,
    bootstrap: int,
    seed: int,
) -> tuple[TrackMetrics, npt.NDArray[np.float64]]:
    """Return the metrics of a track, and AP@10 of each query, float64 [Q]."""
    _check_embeddings(query_embeddings, gallery_embeddings)
    queries, gallery = len(query_embeddings), len(gallery_embeddings)
    pair_query_P, pair_item_P = _relevant_pairs(relevant, queries, gallery)
    pairs_P = pair_query_P * gallery + pair_item_P

    items_QK, _ = top_k(query_embeddings, gallery_embeddings, CUTOFF)
    hits_QK = np.isin(np.arange(queries)[:, None] * gallery + items_QK, pairs_P)
    texts_GK, _ = top_k(gallery_embeddings, query_embeddings, CUTOFF)
    back_GK = np.isin(texts_GK * gallery + np.arange(gallery)[:, None], pairs_P)
    back_AK = back_GK[np.unique(pair_item_P)]  # the A items that answer some query

    ap_Q = _average_precision(hits_QK, np.bincount(pair_query_P))
    metrics = TrackMetrics(
        map10=_bootstrap_mean(ap_Q, resamples=bootstrap, seed=seed),
        r1=float(hits_QK[:, 0].mean()),
        r10=float(hits_QK.any(axis=1).mean()),
        r1_i2t=float(back_AK[:, 0].mean()),
        r10_i2t=float(back_AK.any(axis=1).mean()),
        queries=queries,
        gallery=gallery,
    )
    return metrics, ap_Q


def average_precisions(
    query_embeddings: FloatArray, gallery_embeddings: FloatArray, relevant: Sequence[Sequence[int]]
) -> npt.NDArray[np.float64]:
    """Return AP@10 of each query, float64 [Q]; arguments and errors are those of :func:`evaluate_track`."""
    _check_embeddings(query_embeddings, gallery_embeddings)
    queries, gallery = len(query_embeddings), len(gallery_embeddings)
    pair_query_P, pair_item_P = _relevant_pairs(relevant, queries, gallery)
    items_QK, _ = top_k(query_embeddings, gallery_embeddings, CUTOFF)
    hits_QK = np.isin(np.arange(queries)[:, None] * gallery + items_QK, pair_query_P * gallery + pair_item_P)
    return _average_precision(hits_QK, np.bincount(pair_query_P))


def ratio_of_means(
    values_Q: npt.NDArray[np.float64],
    reference_Q: npt.NDArray[np.float64],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return the ratio of two means over the same queries, with its 95 % bootstrap interval.

    Both are resampled together (paired), so what is hard for both does not widen the interval. The ratio
    may exceed 1.

    Raises:
        ValueError: The two differ in length, are empty, or the reference's mean is zero.
    """
    if len(values_Q) != len(reference_Q) or not len(values_Q) or not reference_Q.mean() > 0:
        raise ValueError("a ratio of means takes two lists of equal length and a reference above zero")
    drawn = np.random.default_rng(seed).integers(0, len(values_Q), (resamples, len(values_Q)))
    below = np.maximum(reference_Q[drawn].mean(axis=1), np.finfo(np.float64).tiny)
    low, high = np.percentile(values_Q[drawn].mean(axis=1) / below, (2.5, 97.5))
    return Interval(value=float(values_Q.mean() / reference_Q.mean()), low=float(low), high=float(high))


def evaluate_tracks(
    tracks: Iterable[TrackLike],
    embed_text: Callable[[list[str]], FloatArray],
    image_embeddings: FloatArray,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    precisions: MutableMapping[str, npt.NDArray[np.float64]] | None = None,
) -> dict[str, TrackMetrics]:
    """Return ``{track name: metrics}``. Each distinct query text is embedded once, in one call.

    Args:
        tracks: Objects with ``name``, ``queries`` and ``gallery`` (see :class:`TrackLike`).
        embed_text: Texts to float32 [n, D], L2-normalised; batches as it likes.
        image_embeddings: float32 [N, D] of all images, row i being image i.
        bootstrap: As for :func:`evaluate_track`.
        seed: As for :func:`evaluate_track`.
        precisions: Filled with AP@10 of each query, float64 [Q], by track.

    Raises:
        ValueError: As :func:`evaluate_track`, or a track's gallery repeats an image or does not
            hold a relevant one.
    """
    tracks = list(tracks)
    row_of: dict[str, int] = {}
    for track in tracks:
        for query in track.queries:
            row_of.setdefault(query.text, len(row_of))
    text_embeddings = embed_text(list(row_of)) if row_of else np.zeros((0, 0), np.float32)
    found: dict[str, TrackMetrics] = {}
    for track in tracks:
        if track.name in found:
            raise ValueError(f"two tracks are called {track.name!r}")
        found[track.name], ap_Q = _evaluated(
            text_embeddings[[row_of[query.text] for query in track.queries]],
            image_embeddings[np.asarray(track.gallery, dtype=np.int64)],
            positions_in_gallery(track),
            bootstrap=bootstrap,
            seed=seed,
        )
        if precisions is not None:
            precisions[track.name] = ap_Q
    return found


def positions_in_gallery(track: TrackLike) -> list[list[int]]:
    """Return, for each query, where its relevant images are in the track's gallery.

    Raises ValueError if the gallery repeats an image or lacks a relevant one.
    """
    position_of = {image: position for position, image in enumerate(track.gallery)}
    if len(position_of) != len(track.gallery):
        raise ValueError(f"the gallery of track {track.name!r} repeats an image")
    try:
        return [[position_of[image] for image in query.relevant] for query in track.queries]
    except KeyError as missing:
        message = f"image {missing} is relevant in track {track.name!r} but not in its gallery"
        raise ValueError(message) from None


def top_k(
    query_embeddings: FloatArray, gallery_embeddings: FloatArray, k: int
) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Return the best ``min(k, G)`` positions int64 [Q, k] and their scores float32 [Q, k], best first.

    Equal scores come in the order of their index, as in the metrics.
    """
    _check_embeddings(query_embeddings, gallery_embeddings)
    queries, gallery = len(query_embeddings), len(gallery_embeddings)
    k = min(k, gallery)
    positions = np.empty((queries, k), dtype=np.int64)
    scores = np.empty((queries, k), dtype=np.float32)
    step = max(1, _BLOCK_ELEMENTS // gallery)
    columns = np.asarray(gallery_embeddings, dtype=np.float32).T
    for start in range(0, queries, step):
        block = np.asarray(query_embeddings[start : start + step], dtype=np.float32) @ columns
        least = np.partition(block, gallery - k, axis=1)[:, gallery - k, None]
        row, column = np.nonzero(block >= least)  # k a row, more where scores tie; in index order
        value = block[row, column]
        order = np.lexsort((-value, row))  # stable, so ties keep their index order
        first = np.searchsorted(row, np.arange(len(block)))
        chosen = order[first[:, None] + np.arange(k)]
        positions[start : start + step] = column[chosen]
        scores[start : start + step] = value[chosen]
    return positions, scores


def _check_embeddings(query_embeddings: FloatArray, gallery_embeddings: FloatArray) -> None:
    for name, embeddings in (("query", query_embeddings), ("gallery", gallery_embeddings)):
        if embeddings.ndim != 2 or len(embeddings) == 0:
            raise ValueError(f"{name} embeddings have shape {embeddings.shape}, expected [n, D] with n > 0")
        bad = int(np.count_nonzero(~np.isfinite(embeddings).all(axis=1)))
        if bad:
            raise UnusableEmbeddingsError(
                f"{bad} of {len(embeddings)} {name} embeddings are not finite; "
                "keep the overflowing layers in a wider precision or train with a lower rate"
            )
    if query_embeddings.shape[1] != gallery_embeddings.shape[1]:
        raise ValueError(
            f"query embeddings have {query_embeddings.shape[1]} dimensions, "
            f"gallery embeddings {gallery_embeddings.shape[1]}"
        )


def _relevant_pairs(
    relevant: Sequence[Sequence[int]], queries: int, gallery: int
) -> tuple[IntArray, IntArray]:
    """Flatten to (query, item) pairs without repeats, ordered by query."""
    if len(relevant) != queries:
        raise ValueError(f"{queries} query embeddings but relevance for {len(relevant)}")
    distinct = [sorted(set(items)) for items in relevant]
    counts = np.array([len(items) for items in distinct], dtype=np.int64)
    if not counts.all():
        raise ValueError(f"query {int(np.argmin(counts))} has no relevant item")
    pair_item_P = np.fromiter((item for items in distinct for item in items), np.int64, counts.sum())
    if pair_item_P.min() < 0 or pair_item_P.max() >= gallery:
        raise ValueError(f"a relevant position is outside of the gallery of {gallery}")
    return np.repeat(np.arange(queries, dtype=np.int64), counts), pair_item_P


def _average_precision(hits_QK: npt.NDArray[np.bool_], relevant_Q: IntArray) -> npt.NDArray[np.float64]:
    """Return AP@10, float64 [Q], from whether each of the first K items is relevant, best first."""
    precision_QK = np.cumsum(hits_QK, axis=1) / np.arange(1, hits_QK.shape[1] + 1)
    ap_Q: npt.NDArray[np.float64] = (precision_QK * hits_QK).sum(axis=1) / relevant_Q
    return ap_Q


def _bootstrap_mean(values: npt.NDArray[np.float64], *, resamples: int, seed: int) -> Interval:
    value = float(values.mean())
    if resamples <= 0:
        return Interval(value=value, low=value, high=value)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _BLOCK_ELEMENTS // len(values))
    for start in range(0, resamples, step):
        size = (min(step, resamples - start), len(values))
        means[start : start + step] = values[rng.integers(0, len(values), size)].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(value=value, low=float(low), high=float(high))
