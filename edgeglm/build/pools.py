"""Tracks in pools: the figures that gates look at.

A single track of 165 queries moves by half a percent when one query flips. Gates therefore look at
the mean over all queries of a pool: the names of the catalogue, the names of unseen concepts, and all
keywords.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeglm.data.pairs import Track
from edgeglm.evaluate.gates import Gate, ratio
from edgeglm.evaluate.retrieval import TrackMetrics


def gate_pools(tracks: Sequence[Track]) -> dict[str, tuple[str, ...]]:
    """Return pool -> track names; empty pools are left out. Tracks of one's own data are one pool."""
    pools = {
        "names": tuple(t.name for t in tracks if t.query_kind == "names" and t.name != "unseen"),
        "unseen names": tuple(t.name for t in tracks if t.query_kind == "names" and t.name == "unseen"),
        "keywords": tuple(t.name for t in tracks if t.query_kind == "keywords"),
    }
    return {pool: members for pool, members in pools.items() if members}


def pooled_map10(metrics: Mapping[str, TrackMetrics], members: Sequence[str]) -> float:
    """Return mAP@10 over all queries of the members together."""
    queries = sum(metrics[name].queries for name in members)
    return sum(metrics[name].map10.value * metrics[name].queries for name in members) / queries


def pool_gates(
    label: str,
    candidate: Mapping[str, TrackMetrics],
    reference: Mapping[str, TrackMetrics],
    pools: Mapping[str, Sequence[str]],
    minimum: float,
) -> tuple[Gate, ...]:
    """Return one gate for each pool on the ratio of pooled mAP@10."""
    return tuple(
        Gate(
            name=f"{label}, {pool}",
            value=ratio(pooled_map10(candidate, members), pooled_map10(reference, members)),
            threshold=minimum,
        )
        for pool, members in pools.items()
    )
