"""EfficientNet-Lite0 of random weights in place of the published ones, for tests that fetch nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeglm.core.artifact import Artifact, listing_of


def published(trunk: Any) -> dict[str, Any]:
    """The trunk's weights under the names of the published file, transposed in memory as some there are."""
    import torch

    found = {}
    for name, value in trunk.state_dict().items():
        told = name.replace("stem._conv_stem", "_conv_stem").replace("stem._bn0", "_bn0")
        told = told.replace("blocks.", "_blocks.", 1) if told.startswith("blocks.") else told
        found[told] = value.transpose(0, 1).contiguous().transpose(0, 1) if value.ndim > 1 else value
    return {**found, "_fc.weight": torch.zeros(1000, 1280)}


def put_lite0(patch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Let the asset ``efficientnet-lite0`` be random weights; ``folder`` takes the place of its package."""
    import torch

    from edgeglm import assets
    from edgeglm.assets import fetch
    from edgeglm.build import sources
    from edgeglm.models.efficientnet_lite import LiteTrunk

    folder.mkdir()
    (folder / "weights").write_text("random, seed 0")
    fetched = Artifact(kind="asset", path=folder, files=listing_of(folder), provenance={})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = LiteTrunk(16, (15,))
        for module in trunk.modules():
            if isinstance(module, torch.nn.Conv2d):  # so that sixteen blocks neither fade nor overflow
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        state = published(trunk)
    real = fetch.fetch_asset

    def here(spec: str, *others: Any, **named: Any) -> Artifact:
        return fetched if spec == "efficientnet-lite0" else real(spec, *others, **named)

    patch.setattr(assets, "fetch_asset", here)
    patch.setattr(sources, "fetch_asset", here)
    patch.setattr("edgeglm.adapt.backbones.lite0_state", lambda _: state)
    return state
