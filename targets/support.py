"""What was seen of each target, as a page: generated from the profiles and a list of evidence.

Nothing is claimed that the list does not name with a file in this repository.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import msgspec

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.targets.description import dotted_sm
from edgeglm.targets.schema import Target, known_targets, load_target, members_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Rung = Literal["device", "gpu", "built", "onnxruntime", "checked"]
"""From the strongest to the weakest."""

RUNGS: dict[Rung, str] = {
    "device": "run on the real device",
    "gpu": "run on a real GPU of its kind",
    "built": "engine really built, without the GPU",
    "onnxruntime": "run through ONNX Runtime",
    "checked": "types and legality only",
}


class Evidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that was seen.

    Attributes:
        targets: Names of shipped profiles.
        rung: How strong it is.
        what: What was seen, in one sentence.
        where: The test or result file that shows it, within the repository.
    """

    targets: tuple[str, ...]
    rung: Rung
    what: str
    where: str


class _List(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    evidence: tuple[Evidence, ...] = ()


def evidence_from_toml(path: Path) -> tuple[Evidence, ...]:
    """Read the list. Raises UserError for a broken one or an unknown target."""
    try:
        found = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _List).evidence
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UserError(f"cannot read {path}: {error}; mend the list of evidence") from error
    for item in found:
        for name in item.targets:
            if name not in known_targets():
                raise unknown_name("target", name, known_targets())
    return found


def support_page(evidence: tuple[Evidence, ...]) -> str:
    """Return the page in Markdown."""
    lines = [
        "# Support matrix",
        "",
        "Made by `scripts/support-matrix` from `targets/profiles/` and `docs/support-evidence.toml`: "
        "edit those and not this page.",
        "",
        "A target stands on the strongest rung that was seen:",
        "",
        *(f"{number}. {words}" for number, words in enumerate(RUNGS.values(), start=1)),
        "",
        "| target | what it is | SM | builder, TensorRT | precisions | seen |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    targets = [load_target(name) for name in known_targets()]
    lines += [_row(target, strongest(target, evidence)) for target in targets]
    lines += ["", "## What was seen", ""]
    for rung, words in RUNGS.items():
        items = [item for item in evidence if item.rung == rung]
        if items:
            lines += [f"**{words[0].upper()}{words[1:]}**", ""]
            lines += [f"- {', '.join(item.targets)}: {item.what} (`{item.where}`)" for item in items] + [""]
    lines += ["## What to know", ""]
    lines += [f"- {target.name}: {note}" for target in targets for note in target.notes]
    return "\n".join([*lines, ""])


def strongest(target: Target, evidence: tuple[Evidence, ...]) -> Rung:
    """Return the strongest rung of a target; a family stands where its weakest member does."""
    order = list(RUNGS)
    ranks = []
    for member in members_of(target):
        found = [order.index(item.rung) for item in evidence if member.name in item.targets]
        ranks.append(min(found, default=len(order) - 1))
    return order[max(ranks)]


def _row(target: Target, rung: Rung) -> str:
    if target.kind == "family":
        members = ", ".join(member.name for member in members_of(target))
        return f"| {target.name} | {target.title}: {members} | | per member | per member | {RUNGS[rung]} |"
    versions = ", ".join(r.version for r in target.runtimes if r.library == target.builder)
    return (
        f"| {target.name} | {target.title} | {dotted_sm(target.sm) if target.sm else '-'} "
        f"| {target.builder} {versions} | {', '.join(target.precisions)} | {RUNGS[rung]} |"
    )
