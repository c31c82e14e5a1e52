"""Further pairs of heads of a teacher, over the text tower as the first pair's tuning left it.

Shapes: V views, N images, F features, R rows, M members, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from edgeglm.adapt.alignment import Alignment
from edgeglm.adapt.beginning import Beginning, phase_checkpoints
from edgeglm.core.recipe import TeacherConfig
from edgeglm.core.stage import Context
from edgeglm.models.joined_heads import JoinedHeads, common_axes
from edgeglm.train.loop import seeded


def member_seed(seed: int, member: int) -> int:
    """Return the seed of a pair of heads, counted from 1: the first one's is the teacher's own.

    Another teacher's seed, one higher, must not draw what a second pair of this one does.
    """
    return seed if member == 1 else int(np.random.SeedSequence([seed, member]).generate_state(1)[0])


def further_alignments(
    beginning: Beginning,
    config: TeacherConfig,
    parts: Mapping[str, Any],
    context: Context,
    used: list[Path],
    *,
    seed: int,
) -> Iterator[Alignment]:
    """Align pairs of heads after the first, until there are ``config.heads``.

    Each goes through all phases but the tuning of the text tower, whose features stay as they are, from
    a seed of its own.

    Args:
        beginning: What the first pair was trained on; its text tower is tuned by now.
        config: What the stage trains.
        parts: What the stage is known by.
        context: Its store keeps the state of each phase.
        used: The folders of those states are added here.
        seed: The stage's.
    """
    decided = msgspec.to_builtins(config)
    del decided["heads"], decided["optimisation"]["checkpoint_epochs"]
    frozen = msgspec.structs.replace(config, lora_epochs=0)
    for member in range(2, config.heads + 1):
        own = member_seed(seed, member)
        known = {**parts, "member": member, "after": decided}
        with seeded(own, threads=context.threads):
            alignment = beginning.alignment(
                frozen,
                seed=own,
                checkpoints=phase_checkpoints(known, config, context, used),
                title=f"Teacher, heads {member} of {config.heads}",
            )
            alignment.run()
        yield alignment


@torch.no_grad()
def joined_heads(
    members: Sequence[tuple[nn.Module, nn.Module]], first: Alignment
) -> tuple[JoinedHeads, JoinedHeads]:
    """Return the image heads as one, and the text heads, along axes of what ``first`` was trained on.

    Args:
        members: Pairs of an image head and a text head.
        first: An alignment whose labelled images and texts say which axes are kept.
    """
    images_RF = first.features_VNF[0][first.labelled.image_N].float()
    texts_RF = first.text_features
    image_heads, text_heads = ([pair[side].eval() for pair in members] for side in (0, 1))
    sides = [
        torch.cat([head(rows_RF) for head in heads], dim=1)
        for heads, rows_RF in ((image_heads, images_RF), (text_heads, texts_RF))
    ]
    axes = common_axes(sides, first.config.embedding_dim)
    return JoinedHeads(image_heads, axes), JoinedHeads(text_heads, axes)
