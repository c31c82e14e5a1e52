"""EfficientNet-Lite0 of random weights in place of the published ones, for tests that fetch nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgeglm.core.artifact import Artifact, listing_of

_SHAPES = ("round", "square", "pointed")


def published(trunk: Any) -> dict[str, Any]:
    """The trunk's weights under the names of the published file, transposed in memory as some there are."""
    import torch

    found = {}
    for name, value in trunk.state_dict().items():
        told = name.replace("stem._conv_stem", "_conv_stem").replace("stem._bn0", "_bn0")
        told = told.replace("blocks.", "_blocks.", 1) if told.startswith("blocks.") else told
        found[told] = value.transpose(0, 1).contiguous().transpose(0, 1) if value.ndim > 1 else value
    return {**found, "_fc.weight": torch.zeros(1000, 1280)}


def classifier(classes: int = 1000, width: int = 16) -> dict[str, Any]:
    """What follows the trunk of all 16 blocks in the published file, narrower and at random."""
    import torch

    norm = {"weight": torch.rand(width) + 0.5, "bias": torch.rand(width)}
    statistics = {"running_mean": torch.zeros(width), "running_var": torch.ones(width)}
    return {
        "_conv_head.weight": torch.randn(width, 320, 1, 1) / 18,
        **{f"_bn1.{name}": value for name, value in {**norm, **statistics}.items()},
        "_fc.weight": torch.randn(classes, width),
        "_fc.bias": torch.randn(classes),
    }


def put_class_names(folder: Path, names: Sequence[str]) -> Artifact:
    """Write a package that calls classes so; words for one class are parted by a comma."""
    told = folder / "timm" / "data" / "_info"
    told.mkdir(parents=True)
    (told / "imagenet_synsets.txt").write_text("".join(f"n{i:04}\n" for i in range(len(names))))
    lines = [f"n{i:04}\t{name}\n" for i, name in enumerate(names)]
    (told / "imagenet_synset_to_lemma.txt").write_text("".join(reversed(lines)))
    return Artifact(kind="asset", path=folder, files=listing_of(folder), provenance={})


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
        state = published(trunk) | classifier()
    names = [f"{_SHAPES[i % 3]} thing {i}" for i in range(1000)]
    found = {
        "efficientnet-lite0": fetched,
        "imagenet-classes": put_class_names(folder / "class-names", names),
    }
    real = fetch.fetch_asset

    def here(spec: str, *others: Any, **named: Any) -> Artifact:
        return found.get(spec) or real(spec, *others, **named)

    patch.setattr(assets, "fetch_asset", here)
    patch.setattr(sources, "fetch_asset", here)
    patch.setattr("edgeglm.adapt.backbones.lite0_state", lambda _: state)
    return state
