"""A fair handful of example retrievals, drawn at random, and the failures that are the worst."""

from __future__ import annotations

import msgspec
import numpy as np

from edgeglm.evaluate.retrieval import FloatArray, TrackLike, positions_in_gallery, top_k


class Retrieved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One answer of a query.

    Attributes:
        image: Index into all images.
        score: Cosine similarity.
        right: Whether the image is relevant to the query.
    """

    image: int
    score: float
    right: bool


class Retrieval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A query and its first answers, best first."""

    query: str
    answers: tuple[Retrieved, ...]


class Hard(Retrieval, frozen=True, kw_only=True):
    """A query that fails: what it wanted, that one's rank (from 1), and how far below the first it scores."""

    wanted: Retrieved
    rank: int
    margin: float


def example_retrievals(
    track: TrackLike,
    query_embeddings: FloatArray,
    image_embeddings: FloatArray,
    *,
    right: int = 8,
    wrong: int = 4,
    k: int = 5,
    seed: int = 0,
) -> tuple[Retrieval, ...]:
    """Draw ``right`` queries whose first answer is right, then ``wrong`` whose first answer is not.

    Args:
        track: The track to draw from.
        query_embeddings: float32 [Q, D], row q for ``track.queries[q]``.
        image_embeddings: float32 [N, D] of all images.
        right: How many successes, at most.
        wrong: How many failures, at most.
        k: Answers a query.
        seed: The same seed draws the same queries, whatever a model answers to the others.
    """
    gallery = np.asarray(track.gallery, dtype=np.int64)
    positions, scores = top_k(query_embeddings, image_embeddings[gallery], k)
    relevant = [set(items) for items in positions_in_gallery(track)]
    order = np.random.default_rng(seed).permutation(len(track.queries)).tolist()
    good = [q for q in order if int(positions[q, 0]) in relevant[q]]
    bad = [q for q in order if int(positions[q, 0]) not in relevant[q]]
    return tuple(
        Retrieval(
            query=track.queries[q].text,
            answers=tuple(
                Retrieved(image=int(gallery[p]), score=float(s), right=int(p) in relevant[q])
                for p, s in zip(positions[q], scores[q], strict=True)
            ),
        )
        for q in (*good[:right], *bad[:wrong])
    )


def hard_retrievals(
    track: TrackLike,
    query_embeddings: FloatArray,
    image_embeddings: FloatArray,
    *,
    count: int = 8,
    k: int = 5,
) -> tuple[Hard, ...]:
    """Return the queries whose best right answer scores furthest below the first one, the worst first.

    Args:
        track: The track to look through.
        query_embeddings: float32 [Q, D], row q for ``track.queries[q]``.
        image_embeddings: float32 [N, D] of all images.
        count: How many, at most; queries that succeed are none of them.
        k: Answers a query.
    """
    gallery = np.asarray(track.gallery, dtype=np.int64)
    rows = image_embeddings[gallery]
    positions, scores = top_k(query_embeddings, rows, k)
    found: list[tuple[float, int, int, float]] = []
    relevant = positions_in_gallery(track)
    for q, items in enumerate(relevant):
        if int(positions[q, 0]) in items:
            continue
        own = (rows @ query_embeddings[q])[items]
        best = int(own.argmax())
        found.append((max(0.0, float(scores[q, 0] - own[best])), q, items[best], float(own[best])))
    hard = []
    for margin, q, item, score in sorted(found, key=lambda one: (-one[0], one[1]))[:count]:
        all_scores = rows @ query_embeddings[q]
        before = np.count_nonzero(all_scores > score) + np.count_nonzero(all_scores[:item] == score)
        right = set(relevant[q])
        hard.append(
            Hard(
                query=track.queries[q].text,
                answers=tuple(
                    Retrieved(image=int(gallery[p]), score=float(s), right=int(p) in right)
                    for p, s in zip(positions[q], scores[q], strict=True)
                ),
                wanted=Retrieved(image=int(gallery[item]), score=score, right=True),
                rank=max(2, 1 + int(before)),  # equal scores rank by index, and it was not the first
                margin=margin,
            )
        )
    return tuple(hard)
