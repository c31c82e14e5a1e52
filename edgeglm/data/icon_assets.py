"""An icon set as it was fetched: what it draws, and what must be said about it."""

from __future__ import annotations

from edgeglm.assets.catalogue import catalogue
from edgeglm.assets.members import asset_member
from edgeglm.core.artifact import Artifact
from edgeglm.data.iconsets import IconSet, icon_set_from_json
from edgeglm.data.pairs import Licence


def icon_set_of(name: str, asset: Artifact) -> IconSet:
    """Read the icon set of that name in the catalogue. Raises UserError for a damaged package."""
    members = catalogue()[name].members
    return icon_set_from_json(asset_member(asset, members["icons"]), asset_member(asset, members["chars"]))


def licence_of_set(name: str, asset: Artifact) -> Licence:
    """Return whom to credit for a fetched source, and under which licence."""
    said = asset.provenance
    return Licence(
        name=name,
        version=str(said.get("version", "")),
        licence=str(said.get("licence", "as its source says")),
        attribution=str(said.get("attribution", name)),
        url=said.get("url"),
    )
