"""Whether there are enough unlabelled images to adapt to; no torch, so that a build asks it at once."""

from __future__ import annotations

from edgeglm.core.errors import UserError
from edgeglm.data.pairs import PairSet

#: Fewer unlabelled images than this say nothing about a domain.
MIN_UNLABELLED = 8


def require_unlabelled(pairs: PairSet) -> None:
    """Raise UserError where there are too few unlabelled images."""
    count = len(pairs.by_role("unlabelled"))
    if count < MIN_UNLABELLED:
        raise UserError(
            f"teacher.domain asks for unlabelled images, and the pairs hold {count}; "
            f"give at least {MIN_UNLABELLED} (in a folder of your own: a folder unlabelled/ or lines "
            "without text; of the icons: data.target with data.inductive_fraction below 1), "
            "or leave teacher.domain out"
        )
