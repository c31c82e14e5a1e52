"""From a recipe's ``data`` table to the stage that makes the pairs, and its inputs."""

from __future__ import annotations

from edgeglm.assets.fetch import fetch_asset
from edgeglm.core.artifact import Artifact
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import DataConfig
from edgeglm.core.stage import Stage
from edgeglm.core.store import Store
from edgeglm.data.auxiliary import auxiliary_assets
from edgeglm.data.folder import INPUT, OwnPairsStage, own_data_artifact
from edgeglm.data.icons import PairsConfig, PairsStage, icon_asset_names


def pairs_stage(data: DataConfig, *, seed: int) -> Stage[PairsConfig]:
    """Return the stage that makes the pairs of ``data``. Its artifact has the kind "pairs"."""
    config = PairsConfig(seed=seed, data=data)
    return PairsStage(config) if data.source == "icons" else OwnPairsStage(config)


def pairs_inputs(data: DataConfig, store: Store, progress: Progress) -> dict[str, Artifact]:
    """Fetch (or hash, where they are local) the inputs of ``pairs_stage``. Raises UserError."""
    if data.source == "icons":
        return {name: fetch_asset(spec, store, progress) for name, spec in pairs_assets(data).items()}
    return {INPUT: own_data_artifact(data)}


def pairs_assets(data: DataConfig) -> dict[str, str]:
    """Return what ``pairs_inputs`` fetches, by the name of the input: nothing for one's own data."""
    return {name: name for name in icon_asset_names(data)} if data.source == "icons" else {}


def auxiliary_inputs(icons: tuple[str, ...], store: Store, progress: Progress) -> dict[str, Artifact]:
    """Fetch the icon sets of other domains that heads are trained on too; empty where there are none."""
    return {name: fetch_asset(spec, store, progress) for name, spec in auxiliary_assets(icons).items()}
