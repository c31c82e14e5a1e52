"""Who may train on what: seeded splits of whole groups, so that variants and copies never straddle."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from edgeglm.core.digest import sha256_bytes

K = TypeVar("K", bound=Hashable)


def hashed_order(names: Iterable[str], *, seed: int, purpose: str) -> list[str]:
    """Return ``names`` in the order of a seeded hash: the same on every machine, unlike ``random``."""
    return sorted(names, key=lambda name: (sha256_bytes(f"{purpose}\0{seed}\0{name}".encode()), name))


def drawn_groups(sizes: Mapping[str, int], fraction: float, *, seed: int, purpose: str) -> frozenset[str]:
    """Draw whole groups until they hold ``fraction`` of all members.

    Args:
        sizes: Members of each group.
        fraction: In [0, 1]. Above 0 at least one group is drawn, below 1 at least one is left.
        seed: Seeds the order.
        purpose: Keeps two draws with one seed independent.
    """
    wanted = fraction * sum(sizes.values())
    drawn: list[str] = []
    count = 0
    for name in hashed_order(sizes, seed=seed, purpose=purpose):
        if count >= wanted:
            break
        # A large group that would overshoot by more than it fills is passed over.
        if drawn and count + sizes[name] - wanted > wanted - count:
            continue
        drawn.append(name)
        count += sizes[name]
    if fraction < 1.0 and len(drawn) == len(sizes):
        drawn = drawn[:-1]
    return frozenset(drawn)


def joined_groups(links: Iterable[Sequence[str]]) -> dict[str, str]:
    """Join names that occur in one link, over any number of steps (union-find).

    Returns the group of each name; a group is called by its least name.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for link in links:
        roots = sorted({root(name) for name in link})
        for other in roots[1:]:
            parent[other] = roots[0]
    return {name: root(name) for name in parent}
