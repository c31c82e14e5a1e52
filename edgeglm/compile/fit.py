"""Whether every board of a target takes some variant of a bundle: asked before the bundle is delivered.

A board that takes none would find that out on arrival. A family is asked board by board, since a variant
may be there for one of its boards alone: lane A is for those with TensorRT 8.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from edgeglm.compile.preflight import Preflight, Subject, preflight
from edgeglm.core.errors import UserError
from edgeglm.targets.schema import Target


class VariantFit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one board says to one variant. ``floor_ms`` is the least time of one call of each tower."""

    member: str
    variant: str
    fits: bool
    refusals: tuple[str, ...] = ()
    floor_ms: float | None = None


def by_variant(subjects: Sequence[Subject]) -> dict[str, list[Subject]]:
    """Group the towers of a bundle by their variant; a graph that is no tower stands for itself."""
    found: dict[str, list[Subject]] = {}
    for subject in subjects:
        found.setdefault(subject.name.rpartition(" ")[0] or subject.name, []).append(subject)
    return found


def fits_of(
    variants: Mapping[str, Sequence[Subject]], members: Sequence[Target], *, batch: int = 1
) -> tuple[VariantFit, ...]:
    """Ask every board about every variant: it fits if all its towers do.

    Args:
        variants: The graphs of each variant.
        members: The boards.
        batch: What the floor is for.
    """
    return tuple(
        _fit(member.name, name, [preflight(subject, member, batches=(batch,)) for subject in subjects])
        for member in members
        for name, subjects in variants.items()
    )


def require_fit(fits: Sequence[VariantFit]) -> None:
    """Raise UserError for the first board that takes no variant; it says what the first refusal was."""
    for member in dict.fromkeys(fit.member for fit in fits):
        mine = [fit for fit in fits if fit.member == member]
        if not any(fit.fits for fit in mine):
            tried = ", ".join(fit.variant for fit in mine)
            raise UserError(f"{member} takes none of {tried}: {mine[0].refusals[0]}")


def _fit(member: str, variant: str, judged: Sequence[Preflight]) -> VariantFit:
    floors = [floor for one in judged for floor in one.floors]
    known = all(floor.binding != "unknown" for floor in floors)
    return VariantFit(
        member=member,
        variant=variant,
        fits=all(one.ok for one in judged),
        refusals=tuple(f"{one.subject}: {reason}" for one in judged for reason in one.refusals),
        floor_ms=sum(floor.floor_ms for floor in floors) if known else None,
    )
