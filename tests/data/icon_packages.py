"""Icon sets of a few icons, packed as npm packs them, and the pairs that are built of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from edgeglm.core.artifact import Artifact, listing_of
from edgeglm.core.progress import QuietProgress
from edgeglm.core.recipe import DataConfig
from edgeglm.core.stage import Context, StageResult
from edgeglm.core.store import Store
from edgeglm.data.icons import PairsConfig, PairsStage

STYLES = ("noto", "openmoji", "twemoji", "emojione", "fluent-emoji-flat")
NAMES = [
    "red-apple", "green-pear", "cook", "man-cook", "woman-cook", "man-cook-dark-skin-tone", "light-bulb",
    "left-arrow", "right-arrow", "dog", "cat", "house", "star", "flag-norway", "flag-bouvet-island", "sun",
]  # fmt: skip


def package(folder: Path, name: str, files: dict[str, object]) -> Artifact:
    """Pack files as npm does and describe them as fetch_asset does."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / f"{name}-1.tgz", "w:gz") as tar:
        for path, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{path}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    said = {"name": name, "version": "1", "licence": "MIT", "attribution": f"{name} by its authors"}
    return Artifact(kind="asset", path=folder, files=listing_of(folder), provenance=said)


def body(style: str, name: str) -> str:
    seed = sum(map(ord, "flag-norway" if name.startswith("flag") else name)) * 7919
    shift = STYLES.index(style) * 3
    colour = f"#{seed % 0xFFFFFF:06x}"
    return f'<rect x="{seed % 9}" y="{seed % 7}" width="{20 + shift}" height="18" fill="{colour}"/>'


def built(packages: dict[str, Artifact], root: Path, *, threads: int = 1, **data: object) -> StageResult:
    config = PairsConfig(data=DataConfig(image_size=16, **data))  # type: ignore[arg-type]
    return PairsStage(config)(packages, Context(store=Store(root), progress=QuietProgress(), threads=threads))
