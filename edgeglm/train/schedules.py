"""How the learning rate goes, and how gradients are kept in proportion to what they change."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

Schedule = Literal["cosine", "exponential"]
_EXPONENTIAL_END = 0.01
_AGC_FLOOR = 1e-3


def warmup_cosine(step: int, *, total: int, warmup: int) -> float:
    """Return the factor of the peak rate at a step counted from 0: a linear rise, then half a cosine to 0.

    Source: Loshchilov & Hutter, SGDR (2017), without restarts; the warm-up of Goyal et al. (2017).
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_exponential(step: int, *, total: int, warmup: int) -> float:
    """Return the factor at a step: a linear rise, then a constant ratio a step down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return float(_EXPONENTIAL_END ** ((step - warmup) / max(1, total - warmup)))


SCHEDULES = {"cosine": warmup_cosine, "exponential": warmup_exponential}


@torch.no_grad()
def clip_adaptively(parameters: Iterable[nn.Parameter], ratio: float) -> None:
    """Shrink the gradient of each output unit to at most ``ratio`` times the norm of its weights.

    Adaptive gradient clipping (Brock et al., High-Performance Large-Scale Image Recognition Without
    Normalization, 2021): a unit is a row of a matrix or a filter of a convolution; of a bias or a
    gain, which are vectors, the whole. Weights count as at least 1e-3, so that zeros can leave zero.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        weight_norm = _unit_norm(parameter).clamp(min=_AGC_FLOOR)
        gradient_norm = _unit_norm(gradient)
        most = ratio * weight_norm
        scale = torch.where(gradient_norm > most, most / gradient_norm.clamp(min=1e-12), 1.0)
        gradient.mul_(scale)


def _unit_norm(x: torch.Tensor) -> torch.Tensor:
    if x.ndim <= 1:
        return x.square().sum().sqrt()
    shape = (-1, *[1] * (x.ndim - 1))
    return x.flatten(1).square().sum(1).sqrt().reshape(shape)


class AdaptiveLR(torch.optim.lr_scheduler.LambdaLR):
    """A rate that rises over ``warmup_steps``, falls after them, and is halved where the loss stands still.

    Call :meth:`step` after each ``optimizer.step()``. With ``total_steps`` the fall is half a cosine (or
    ``schedule``), at whose end it stays; without, the inverse square root of the step (Vaswani et al., 2017),
    which needs no end. Told of losses through :meth:`watch`, it halves the rate after ``patience`` of them
    without a better one, as ReduceLROnPlateau does.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        >>> schedule = AdaptiveLR(optimizer, warmup_steps=2)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> [round(rate, 6) for rate in rates]
        [0.0005, 0.001, 0.000816, 0.000707]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        warmup_steps: int = 500,
        total_steps: int | None = None,
        schedule: Schedule = "cosine",
        patience: int = 100,
    ) -> None:
        if warmup_steps < 1 or (total_steps is not None and total_steps < warmup_steps):
            raise ValueError(f"warmup_steps is {warmup_steps}; give at least 1 and at most total_steps")
        if schedule not in SCHEDULES or patience < 1:
            raise ValueError(
                f"schedule is {schedule!r} and patience {patience}; "
                f"give one of {', '.join(SCHEDULES)} and at least 1"
            )
        if total_steps is None and schedule != "cosine":
            raise ValueError(
                f"schedule is {schedule!r}, and a fall without an end follows none; give total_steps"
            )
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.schedule = schedule
        self.patience = patience
        self.best, self.waited, self.halvings = math.inf, 0, 0
        super().__init__(optimizer, self._factor)

    def watch(self, loss: float | torch.Tensor) -> None:
        """Take note of a loss, of which only the number is kept. Losses may be below 0."""
        value = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        least = 0.0 if math.isinf(self.best) else 1e-3 * abs(self.best)
        if value < self.best - least:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.halvings, self.waited = self.halvings + 1, 0

    def _factor(self, step: int) -> float:
        halved = float(0.5**self.halvings)
        if self.total_steps is not None:
            step = min(step, self.total_steps)  # a cosine would rise again
            return halved * SCHEDULES[self.schedule](step, total=self.total_steps, warmup=self.warmup_steps)
        if step < self.warmup_steps:
            return halved * (step + 1) / self.warmup_steps
        return halved * math.sqrt(self.warmup_steps / (step + 1))
