"""How several losses that share parameters are weighed against one another.

Each way turns the losses of a step into one scalar to go back from. Where a way needs the gradients of
single losses it takes them itself, from the shared parameters only.

Shapes: T losses, P shared parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgeglm.core.errors import UserError

_GRADNORM_RATE = 0.025
_LEAST_WEIGHT = 1e-3
_NOTHING = 1e-12


class Balance(Protocol):
    """A way to weigh losses, with a state of its own."""

    def combined(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the scalar to go back from."""

    def parameters(self) -> list[nn.Parameter]:
        """Return what it trains besides."""

    def gates(self) -> list[Gate]:
        """Return, for each loss, what its shared inputs must pass."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take it back."""


class Gate:
    """Lets a tensor through as it is, and its gradient times ``weight``, which may be set afterwards."""

    def __init__(self) -> None:
        self.weight = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        found: Tensor = _Gated.apply(x, self)  # type: ignore[no-untyped-call]
        return found


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.gate.weight, None


class FixedBalance:
    """The plain sum."""

    def __init__(self, count: int) -> None:
        self._gates = [Gate() for _ in range(count)]

    def combined(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the sum."""
        return torch.stack(list(losses)).sum()

    def parameters(self) -> list[nn.Parameter]:
        """Return nothing."""
        return []

    def gates(self) -> list[Gate]:
        """Return gates that stay open."""
        return self._gates

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take nothing."""


class UncertaintyBalance(FixedBalance):
    """Half of each loss over a learned variance, and half the variance's logarithm (Kendall et al., 2018)."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.log_variance_T = nn.Parameter(torch.zeros(count))

    def combined(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the sum over tasks of (exp(-s) L + s) / 2."""
        loss_T = torch.stack(list(losses))
        return 0.5 * (torch.exp(-self.log_variance_T) * loss_T + self.log_variance_T).sum()

    def parameters(self) -> list[nn.Parameter]:
        """Return the logarithms of the variances."""
        return [self.log_variance_T]


class GradNormBalance(FixedBalance):
    """Weights under which every loss has fallen by the same share (GradNorm, Chen et al., 2018).

    A weight is moved, by a sign and a rate, towards where the norm of its loss's gradient at ``shared`` is
    the mean norm times the loss's relative training rate to the power of ``alpha``; weights sum to their
    count. A batch without a case of some loss, which is then nothing, moves no weight and is no first one.
    """

    def __init__(self, count: int, shared: Sequence[Tensor], *, alpha: float) -> None:
        super().__init__(count)
        self.shared = list(shared)
        self.alpha = alpha
        self.weight_T = torch.ones(count)
        self.first_T: Tensor | None = None

    def combined(self, losses: Sequence[Tensor]) -> Tensor:
        """Move the weights, and return the losses weighed by them."""
        loss_T = torch.stack([loss.detach() for loss in losses])
        first_T = torch.zeros_like(loss_T) if self.first_T is None else self.first_T
        self.first_T = torch.where(first_T > 0, first_T, loss_T)
        if bool((loss_T > 0).all()):
            self._move(loss_T / self.first_T, losses)
        return (torch.stack(list(losses)) * self.weight_T).sum()

    def _move(self, pace_T: Tensor, losses: Sequence[Tensor]) -> None:
        norm_T = torch.stack([_flat_gradient(loss, self.shared).norm() for loss in losses])
        now_T = self.weight_T * norm_T
        wanted_T = now_T.mean() * (pace_T / pace_T.mean().clamp(min=_NOTHING)) ** self.alpha
        scale = norm_T.mean().clamp(min=_NOTHING)  # so that the rate means the same at any size of loss
        moved_T = self.weight_T - _GRADNORM_RATE * torch.sign(now_T - wanted_T) * norm_T / scale
        moved_T = moved_T.clamp(min=_LEAST_WEIGHT)
        self.weight_T = moved_T * len(losses) / moved_T.sum()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the first losses."""
        return {"weight": self.weight_T.clone(), "first": self.first_T}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take them back."""
        self.weight_T, self.first_T = state["weight"], state["first"]


class ConflictFreeBalance(FixedBalance):
    """Gradients at the shared parameters, each projected off those it conflicts with (PCGrad, 2020).

    Yu et al., by ``torchjd``. The projected sum is a weighted sum of the gradients, so the weights are
    found from their products and set in the gates: what only one loss uses keeps its own gradient.
    """

    def __init__(self, count: int, shared: Sequence[Tensor]) -> None:
        super().__init__(count)
        self.shared = list(shared)
        self.weigh = _projection()

    def combined(self, losses: Sequence[Tensor]) -> Tensor:
        """Set the gates and return the sum."""
        for gate in self._gates:
            gate.weight = 1.0
        gradient_TP = torch.stack([_flat_gradient(loss, self.shared) for loss in losses])
        weight_T = self.weigh(gradient_TP @ gradient_TP.T)
        for gate, weight in zip(self._gates, weight_T.tolist(), strict=True):
            gate.weight = weight
        return torch.stack(list(losses)).sum()


def _projection() -> Callable[[Tensor], Tensor]:
    try:
        from torchjd.aggregation import PCGradWeighting
    except ImportError as error:
        raise UserError(
            "teacher.multitask.balance = \"pcgrad\" needs torchjd; pip install 'edgeglm[build]'"
        ) from error
    weighting: Callable[[Tensor], Tensor] = PCGradWeighting()
    return weighting


def _flat_gradient(loss: Tensor, shared: Sequence[Tensor]) -> Tensor:
    found: Sequence[Tensor | None] = torch.autograd.grad(
        loss, list(shared), retain_graph=True, allow_unused=True
    )
    return torch.cat(
        [
            torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
            for gradient, parameter in zip(found, shared, strict=True)
        ]
    )
