"""Published weights, read out of the packages that carry them."""

from __future__ import annotations

import io
from typing import Any

from edgeglm.assets import asset_member, asset_named
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError


def lite0_state(source: Artifact) -> dict[str, Any]:
    """Return the published weights of EfficientNet-Lite0. Raises UserError when they are damaged."""
    import torch

    data = asset_member(source, asset_named("efficientnet-lite0").members["weights"])
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"cannot read the weights of EfficientNet-Lite0: {error}; fetch them again"
        ) from error
    return state
