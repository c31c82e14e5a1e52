"""A training that goes on after it was killed: everything an epoch ends with, in one file.

Beside parameters and the optimizer's state it keeps torch's random state and whatever else a loop carries,
so the losses that follow are the ones that would have followed.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgeglm.core.errors import UserError

_ENTRIES = {"identity", "epoch", "finished", "curve", "parameters", "optimizer", "random", "carried"}


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


class CarriedBuffers:
    """What a module counts and no optimizer knows, such as the running means of its batch norms."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        """Return copies."""
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Fill them again."""
        for name, buffer in self.module.named_buffers():
            buffer.copy_(state[name])


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a loop keeps its state, and how often.

    Attributes:
        path: The file, replaced in one step.
        identity: What tells this training from others: a stage's key, a digest of recipe and model.
        every: Epochs between two writings, 0 for none; the end of the training is always written.
        carried: What else the loop changes.
        before: Where the phase before this one ended, to be named if this one has nothing yet.
    """

    path: Path
    identity: str
    every: int = 1
    carried: Sequence[Carried] = field(default_factory=tuple)
    before: Path | None = None

    def due(self, epoch: int) -> bool:
        """Say whether the state after ``epoch`` is to be written."""
        return self.every > 0 and (epoch + 1) % self.every == 0

    def state(
        self,
        *,
        epoch: int,
        curve: Sequence[float],
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        finished: bool,
    ) -> dict[str, Any] | None:
        """Return a copy of the state after ``epoch``; None if a parameter is no number."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            return None
        return copy.deepcopy(
            {
                "identity": self.identity,
                "epoch": epoch,
                "finished": finished,
                "curve": list(curve),
                "parameters": [parameter.detach() for parameter in parameters],
                "optimizer": optimizer.state_dict(),
                "random": torch.random.get_rng_state(),
                "random_gpu": torch.cuda.get_rng_state_all() if _on_gpu(parameters) else [],
                "carried": [one.state_dict() for one in self.carried],
            }
        )

    def write(self, state: Mapping[str, Any] | None) -> bool:
        """Keep a state, unless there is none; say whether it was kept."""
        if state is None:
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        with beside.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        return True

    def last_good(self) -> Path | None:
        """Return the file of the last good state: of this phase, else of the one before it."""
        for path in (self.path, self.before):
            if path is not None and path.exists():
                return path
        return None

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
            kept = torch.load(self.path, weights_only=True, map_location="cpu")  # of a GPU too
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise UserError(f"cannot read the checkpoint {self.path}: {error}; delete it") from error
        if not isinstance(kept, dict) or not set(kept) >= _ENTRIES:
            raise UserError(f"the file {self.path} is no checkpoint of a training; delete it")
        shapes = [tuple(parameter.shape) for parameter in parameters]
        if kept["identity"] != self.identity or [tuple(p.shape) for p in kept["parameters"]] != shapes:
            raise self._foreign()
        try:
            optimizer.load_state_dict(kept["optimizer"])
            with torch.no_grad():
                for parameter, value in zip(parameters, kept["parameters"], strict=True):
                    parameter.copy_(value)
            for one, state in zip(self.carried, kept["carried"], strict=True):
                one.load_state_dict(state)
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign() from error
        torch.random.set_rng_state(kept["random"])
        if _on_gpu(parameters) and len(kept.get("random_gpu", [])) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(kept["random_gpu"])
        return kept["epoch"] + 1, list(kept["curve"]), bool(kept["finished"])

    def _foreign(self) -> UserError:
        return UserError(
            f"the checkpoint {self.path} is of another model or recipe; delete it or choose another"
        )


def _on_gpu(parameters: Sequence[nn.Parameter]) -> bool:
    return any(parameter.is_cuda for parameter in parameters)
