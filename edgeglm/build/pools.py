"""Tracks in pools: the figures that gates look at.

A single track of 165 queries moves by half a percent when one query flips. Gates therefore look at
the mean over all queries of a pool: the names of the catalogue, the names of unseen concepts, and all
keywords; of each language apart where there are several.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeglm.data.pairs import Track
from edgeglm.evaluate.gates import Gate, ratio
from edgeglm.evaluate.retrieval import Interval, TrackMetrics, ratio_of_means


def gate_pools(tracks: Sequence[Track]) -> dict[str, tuple[str, ...]]:
    """Return pool -> track names; empty pools are left out. Tracks of one's own data are one pool.

    Each language has pools of its own; those of a language after the first begin with its tag: ``zh names``.
    """
    languages = list(dict.fromkeys(track.language for track in tracks))
    pools: dict[str, tuple[str, ...]] = {}
    for language in languages:
        mark = "" if language == languages[0] else f"{language} "
        own = [track for track in tracks if track.language == language]
        names = [track.name for track in own if track.query_kind == "names"]
        pools |= {
            f"{mark}names": tuple(name for name in names if not _is_unseen(name)),
            f"{mark}unseen names": tuple(name for name in names if _is_unseen(name)),
            f"{mark}keywords": tuple(track.name for track in own if track.query_kind == "keywords"),
        }
    return {pool: members for pool, members in pools.items() if members}


def required_pools(pools: Collection[str]) -> tuple[str, ...]:
    """Return the pools that a student must not fall short on: the names of each language."""
    return tuple(pool for pool in pools if pool.endswith("names") and not pool.endswith("unseen names"))


def _is_unseen(track: str) -> bool:
    return track == "unseen" or track.endswith("-unseen")


def pooled_map10(metrics: Mapping[str, TrackMetrics], members: Sequence[str]) -> float:
    """Return mAP@10 over all queries of the members together."""
    queries = sum(metrics[name].queries for name in members)
    return sum(metrics[name].map10.value * metrics[name].queries for name in members) / queries


def pooled_ratio(
    candidate: Mapping[str, npt.NDArray[np.float64]],
    reference: Mapping[str, npt.NDArray[np.float64]],
    members: Sequence[str],
) -> Interval | None:
    """Return the ratio of mAP@10 over all queries of the members, with its paired 95 % interval.

    Both map a track to AP@10 of each query, float64 [Q]. None where the reference finds nothing.
    """
    mine, theirs = (np.concatenate([side[name] for name in members]) for side in (candidate, reference))
    return ratio_of_means(mine, theirs) if theirs.mean() > 0 else None


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Student / teacher mAP@10 by track and by pool, each with its paired interval over the same queries.

    Left out where the teacher finds nothing. Pools are those of :func:`gate_pools`, and all names.
    """

    tracks: Mapping[str, Interval]
    pools: Mapping[str, Interval]


def ratios_of(
    student: Mapping[str, npt.NDArray[np.float64]],
    teacher: Mapping[str, npt.NDArray[np.float64]],
    tracks: Sequence[Track],
) -> Ratios:
    """Return the ratios of AP@10 by track, ``{track: float64 [Q]}`` on either side."""
    pools = gate_pools(tracks)
    for unseen in [pool for pool in pools if pool.endswith("unseen names")]:
        mark = unseen.removesuffix("unseen names")
        pools[f"{mark}all names"] = (*pools.get(f"{mark}names", ()), *pools[unseen])
    by_track = {track.name: pooled_ratio(student, teacher, (track.name,)) for track in tracks}
    by_pool = {pool: pooled_ratio(student, teacher, members) for pool, members in pools.items()}
    return Ratios(
        tracks={name: found for name, found in by_track.items() if found is not None},
        pools={name: found for name, found in by_pool.items() if found is not None},
    )


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
