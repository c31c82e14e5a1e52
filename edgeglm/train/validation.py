"""A training that stops when what it has not seen no longer gets better, and keeps its best state.

The rule is plain early stopping with patience (Prechelt, Early stopping - but when?, 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Validation:
    """The loss on what is held back, after every epoch, and the state that had the lowest.

    It is carried by a checkpoint, so that a training that goes on stops where it would have stopped.

    Attributes:
        module: What is trained; its parameters and buffers are kept and put back.
        patience: Epochs without a new lowest loss after which to stop.
        curve: The losses so far.
    """

    def __init__(self, module: nn.Module, loss: Callable[[], float], *, patience: int) -> None:
        self.module, self.patience = module, patience
        self.curve: list[float] = []
        self._loss = loss
        self._best: dict[str, Any] = {}

    def stops(self) -> bool:
        """Take the loss of the epoch that ended, and say whether it was the last."""
        with torch.no_grad(), evaluating(self.module):
            self.curve.append(self._loss())
        best = min(range(len(self.curve)), key=self.curve.__getitem__)
        if best == len(self.curve) - 1:
            self._best = {name: value.clone() for name, value in self.module.state_dict().items()}
        return len(self.curve) - 1 - best >= self.patience

    def restore(self) -> None:
        """Put the best state back."""
        if self._best:
            self.module.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        return {"curve": list(self.curve), "best": dict(self._best)}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take it back."""
        self.curve, self._best = list(state["curve"]), dict(state["best"])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for the body, and each part of it back into its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def held_back(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positions 0 to count - 1 into those that train and a twentieth that validates, int64, ascending.

    Fewer than two cannot be split: all train and all validate.
    """
    if count < 2:
        return torch.arange(count), torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    apart = max(1, count // 20)
    return order[apart:].sort().values, order[:apart].sort().values
