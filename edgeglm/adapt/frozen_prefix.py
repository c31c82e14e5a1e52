"""The frozen first blocks of a text tower, run once: what they say to each text is kept and read again.

When only the last blocks are tuned, the blocks before them say the same in every step, and most of a step
would go into saying it. Dropout in them is off, as in a model that is used.

Shapes: B batch, L tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeglm.adapt.text_teacher import TextTeacher
from edgeglm.adapt.tuning import anatomy_of

_BATCH = 128


class KeptPrefix(nn.Module):
    """Stands in for the embeddings: gives what the frozen blocks said to the chosen texts, [B, L, H]."""

    def __init__(self, hidden_by_text: dict[str, Tensor]) -> None:
        super().__init__()
        self.hidden_by_text = hidden_by_text
        self.chosen: tuple[Sequence[str], int] = ((), 0)

    def choose(self, texts: Sequence[str], length: int) -> None:
        """Say which texts the next call is about, and to how many tokens they are filled up."""
        self.chosen = (texts, length)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Return the kept rows, zeros where a text is shorter; those places are masked anyway."""
        texts, length = self.chosen
        rows = [self.hidden_by_text[text] for text in texts]
        out = torch.zeros(len(rows), length, rows[0].shape[1], device=rows[0].device)
        for place, row in zip(out, rows, strict=True):
            place[: len(row)] = row
        return out


@contextmanager
def kept_prefix(teacher: TextTeacher, texts: Sequence[str], tuned_blocks: int) -> Iterator[None]:
    """Within the body, ``teacher.features`` of ``texts`` starts at the first of the last ``tuned_blocks``.

    The parameters that train must all be in those blocks. The tower is whole again afterwards. With 0 blocks
    nothing changes.
    """
    if tuned_blocks == 0:
        yield
        return
    anatomy = anatomy_of(teacher.tower.encoder)
    blocks = anatomy.blocks
    prefix = len(blocks) - tuned_blocks
    if prefix <= 0:
        yield
        return
    embeddings = anatomy.embeddings_owner.embeddings
    kept = KeptPrefix(_hidden_after(teacher, texts, blocks[prefix - 1]))
    setattr(anatomy.blocks_owner, anatomy.blocks_name, blocks[prefix:])
    anatomy.embeddings_owner.embeddings = kept
    teacher.prefix = kept
    try:
        yield
    finally:
        setattr(anatomy.blocks_owner, anatomy.blocks_name, blocks)
        anatomy.embeddings_owner.embeddings = embeddings
        teacher.prefix = None


def _hidden_after(teacher: TextTeacher, texts: Sequence[str], block: nn.Module) -> dict[str, Tensor]:
    caught: list[Tensor] = []

    def catch(_: nn.Module, __: Any, found: Any) -> None:
        caught.append(found[0] if isinstance(found, tuple) else found)

    kept: dict[str, Tensor] = {}
    handle = block.register_forward_hook(catch)
    order = sorted(dict.fromkeys(texts), key=len)
    training = teacher.tower.training
    teacher.tower.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), _BATCH):
                chosen = order[start : start + _BATCH]
                caught.clear()
                teacher.features(chosen)
                _, mask = teacher.tokenizer.encode(list(chosen), max_length=teacher.max_length)
                for text, row, length in zip(chosen, caught[0], mask.sum(1).tolist(), strict=True):
                    kept[text] = row[: int(length)].clone()
    finally:
        handle.remove()
        teacher.tower.train(training)
    return kept
