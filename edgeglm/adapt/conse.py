"""The classes of an image classifier that may be named beside one's own pairs, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeglm.assets import asset_member, asset_named
from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import TeacherConfig
from edgeglm.data.auxiliary import held_back_in
from edgeglm.data.pairs import PairSet

if TYPE_CHECKING:
    from edgeglm.models.conse import ConseImageHead, ConseTextHead
    from edgeglm.models.projection import LearnedHead, ProjectionHead

#: The catalogue asset that says what the classes of ImageNet are called.
CLASS_NAMES = "imagenet-classes"


@dataclass(frozen=True, kw_only=True)
class NamedClasses:
    """``place`` counts the classes that are named, in the order of the logits, and ``names`` calls them."""

    classes: int
    place: tuple[int, ...]
    names: tuple[str, ...]


def named_classes(source: Artifact, pairs: PairSet) -> NamedClasses:
    """Return the classes of which nothing says what an evaluation holds out.

    Every word for a class is held against the names of unseen concepts; the first calls it.

    Raises:
        UserError: The file is damaged, or no class is left.
    """
    members = asset_named(CLASS_NAMES).members
    try:
        synsets = asset_member(source, members["synsets"]).decode().split()
        lines = asset_member(source, members["lemmas"]).decode().splitlines()
        words = dict(line.split("\t", 1) for line in lines)
        called = [words[synset].split(", ") for synset in synsets]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"cannot read the names of the ImageNet classes: {error}; fetch them again"
        ) from error
    held_back = held_back_in(pairs)
    place = tuple(i for i, texts in enumerate(called) if not any(held_back(text) for text in texts))
    if not place:
        raise UserError("no class of ImageNet may be named beside these pairs; leave teacher.conse out")
    return NamedClasses(classes=len(synsets), place=place, names=tuple(called[i][0] for i in place))


def conse_heads(
    learned: LearnedHead, text: ProjectionHead, named: NamedClasses, config: TeacherConfig
) -> tuple[ConseImageHead, ConseTextHead]:
    """Return heads that add the names of classes to what these two learn, as ``config.conse`` says."""
    import torch

    from edgeglm.models.conse import ConseImageHead, ConseTextHead

    told = ConseImageHead(
        learned,
        torch.tensor(named.place),
        classes=named.classes,
        dimensions=config.embedding_dim,
        weight=config.conse.weight,
        temperature=config.conse.temperature,
    )
    return told, ConseTextHead(text, weight=config.conse.weight)
