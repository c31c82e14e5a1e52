"""The pretrained models that a recipe names, and how they are fetched."""

from __future__ import annotations

from edgeglm.adapt.backbones import CLASSIFIED_BY
from edgeglm.adapt.conse import CLASS_NAMES
from edgeglm.core.artifact import Artifact
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.store import Store


def source_spec(name: str) -> str:
    """Return what ``fetch_asset`` takes for a model named in a recipe: a bare folder becomes ``file:``."""
    return f"file:{name}" if ":" not in name and ("/" in name or name.startswith(".")) else name


def teacher_inputs(config: TeacherConfig, store: Store, progress: Progress) -> dict[str, Artifact]:
    """Fetch the pretrained towers: ``image-0``, ``image-1``, ..., ``text``, and what ``conse`` needs."""
    from edgeglm.assets import fetch_asset

    return {name: fetch_asset(spec, store, progress) for name, spec in teacher_assets(config).items()}


def teacher_assets(config: TeacherConfig) -> dict[str, str]:
    """Return what ``teacher_inputs`` fetches, by the name of the input."""
    found = {f"image-{i}": source_spec(name) for i, name in enumerate(config.image)}
    if config.conse.weight:
        found |= {"classifier": CLASSIFIED_BY, "class-names": CLASS_NAMES}
    return {**found, "text": source_spec(config.text)}
