"""Whether every board of a target takes some variant of a bundle: asked before the bundle is delivered.

A board that takes none would find that out on arrival. The answers travel in ``preflight.json``, with
the reason of every refusal and the floor of a call, which is a bound and no promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgeglm.bundle.manifest import Manifest, VariantRecord
from edgeglm.compile.preflight import Preflight, Subject, preflight
from edgeglm.compile.stage import precision_of
from edgeglm.core.errors import UserError
from edgeglm.targets.costs import costs_from_json, costs_name
from edgeglm.targets.schema import ResolvedTarget

FIT_NAME = "preflight.json"


class VariantFit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one board says to one variant. ``floor_ms`` is the least time of both towers at batch 1."""

    member: str
    variant: str
    fits: bool
    refusals: tuple[str, ...] = ()
    floor_ms: float | None = None


def fits_of(
    manifest: Manifest, sources: Mapping[str, Path | bytes], target: ResolvedTarget
) -> tuple[VariantFit, ...]:
    """Ask every member of the target about every variant.

    Args:
        manifest: The variants and their files.
        sources: With the recorded costs of every model.
        target: The resolved target.

    Raises:
        UserError: A member takes no variant; it names the first refusal.
    """
    found = []
    for member in target.members:
        fits = []
        for variant in manifest.variants:
            judged = [preflight(subject, member) for subject in _subjects(variant, sources)]
            fits.append(_fit(member.name, variant.name, judged))
        if not any(fit.fits for fit in fits):
            tried = ", ".join(variant.name for variant in manifest.variants)
            raise UserError(f"{member.name} takes none of {tried}: {fits[0].refusals[0]}")
        found += fits
    return tuple(found)


def _fit(member: str, variant: str, judged: list[Preflight]) -> VariantFit:
    floors = [floor for one in judged for floor in one.floors]
    known = all(floor.binding != "unknown" for floor in floors)
    return VariantFit(
        member=member,
        variant=variant,
        fits=all(one.ok for one in judged),
        refusals=tuple(f"{one.subject}: {reason}" for one in judged for reason in one.refusals),
        floor_ms=sum(floor.floor_ms for floor in floors) if known else None,
    )


def _subjects(variant: VariantRecord, sources: Mapping[str, Path | bytes]) -> list[Subject]:
    subjects = []
    for tower, file in sorted(variant.files.items()):
        name = costs_name(variant.name, tower)
        source = sources[name]
        costs = costs_from_json(source if isinstance(source, bytes) else source.read_bytes(), name)
        subjects.append(
            Subject(
                name=f"{variant.name} {tower}",
                precision=precision_of(variant.name),
                lane=variant.lane,
                costs=costs,
                file=file,
            )
        )
    return subjects
