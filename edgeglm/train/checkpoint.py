"""A training that goes on after it was killed: everything an epoch ends with, in one file.

Beside parameters and the optimizer's state it keeps torch's random state and whatever else a loop carries,
so the losses that follow are the ones that would have followed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgeglm.core.errors import UserError


class Carried(Protocol):
    """Something besides parameters that a loop changes: state as plain numbers and tensors, and back."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """Take the state back."""


class CarriedTensor:
    """A tensor that a loop fills in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, Any]:
        """Return a copy."""
        return {"tensor": self.tensor.clone()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Fill it again."""
        self.tensor.copy_(state["tensor"])


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a loop keeps its state, and how often.

    Attributes:
        path: The file, replaced in one step.
        identity: What tells this training from others: a stage's key, a digest of recipe and model.
        every: Epochs between two writings; the end of the training is always written.
        carried: What else the loop changes.
    """

    path: Path
    identity: str
    every: int = 1
    carried: Sequence[Carried] = field(default_factory=tuple)

    def write(
        self,
        *,
        epoch: int,
        curve: Sequence[float],
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        finished: bool,
    ) -> bool:
        """Keep the state after ``epoch``, unless a parameter is no number; say whether it was kept."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        with beside.open("wb") as file:
            torch.save(
                {
                    "identity": self.identity,
                    "epoch": epoch,
                    "finished": finished,
                    "curve": list(curve),
                    "parameters": [parameter.detach() for parameter in parameters],
                    "optimizer": optimizer.state_dict(),
                    "random": torch.random.get_rng_state(),
                    "carried": [one.state_dict() for one in self.carried],
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        return True

    def read(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[float], bool] | None:
        """Put the kept state back and return the epoch to go on with, the curve so far, and if it is done.

        None if there is no file.

        Raises:
            UserError: The file is of another model or recipe, or is damaged.
        """
        if not self.path.exists():
            return None
        try:
            kept = torch.load(self.path, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise UserError(f"cannot read the checkpoint {self.path}: {error}; delete it") from error
        shapes = [tuple(parameter.shape) for parameter in parameters]
        if kept.get("identity") != self.identity or [tuple(p.shape) for p in kept["parameters"]] != shapes:
            raise UserError(
                f"the checkpoint {self.path} is of another model or recipe; delete it or choose another"
            )
        with torch.no_grad():
            for parameter, value in zip(parameters, kept["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(kept["optimizer"])
        torch.random.set_rng_state(kept["random"])
        for one, state in zip(self.carried, kept["carried"], strict=True):
            one.load_state_dict(state)
        return kept["epoch"] + 1, list(kept["curve"]), bool(kept["finished"])
