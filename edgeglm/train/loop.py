"""The one training loop: AdamW, warm-up and cosine decay, and a stop at the first loss that is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress
from edgeglm.train.checkpoint import Checkpoint
from edgeglm.train.memory import memory_advice
from edgeglm.train.precision import Precision, mixed
from edgeglm.train.schedules import SCHEDULES, Schedule, clip_adaptively, warmup_cosine
from edgeglm.train.validation import Validation

__all__ = [
    "DivergedError", "FitOptions", "Group", "fit", "seeded", "shuffled", "steps_in", "stretch_of",
    "warmup_cosine",
]  # fmt: skip

B = TypeVar("B")


class DivergedError(UserError):
    """A loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a peak learning rate and a weight decay."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What a loop may do besides; by default nothing.

    Attributes:
        schedule: How the rate falls after the warm-up.
        adaptive_clip: Largest ratio of a unit's gradient to its weights (Brock et al., 2021); 0 for none.
        accumulate: Batches whose mean gradient makes one step of the optimizer.
        patience: Stop after so many epochs whose mean loss is not a thousandth better; 0 for never.
        validation: Stops by what is held back, with the best state; a checkpoint must carry it.
        checkpoint: Where to keep the state, and to go on from.
        lower: What to lower where memory does not suffice, in the user's words.
        rate: What to lower where the loss diverges, in the user's words.
        precision: What the forward pass is computed in.
    """

    schedule: Schedule = "cosine"
    adaptive_clip: float = 0.0
    accumulate: int = 1
    patience: int = 0
    validation: Validation | None = None
    checkpoint: Checkpoint | None = None
    lower: str = "the batch size"
    rate: str = "the learning rate"
    precision: Precision = "float32"


def fit(
    groups: Sequence[Group],
    batches: Callable[[int], Iterable[B]],
    loss_of: Callable[[B], Tensor],
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup: int = 20,
    clip: float | None = None,
    title: str,
    progress: Progress,
    options: FitOptions | None = None,
) -> list[float]:
    """Train in place and return the mean loss of each epoch.

    Args:
        groups: What is trained, and how fast.
        batches: Epoch, counted from 0 -> its ``steps_per_epoch`` batches.
        loss_of: Batch -> scalar loss.
        epochs: How many.
        steps_per_epoch: For the schedule and the bar.
        warmup: Steps of linear rise; a tenth of all steps at the most.
        clip: Largest gradient norm over all groups, if any.
        title: What the bar says.
        progress: Shows one step a batch.
        options: Schedule, accumulation, early stop, checkpoint.

    Raises:
        DivergedError: A loss, or what an epoch leaves behind, is not finite; it names batch, step and epoch,
            and the last good checkpoint.
        UserError: The checkpoint is of another model or recipe, or memory does not suffice; it says what
            to lower.
    """
    options = options or FitOptions()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay}
            for g in groups
        ],
        fused=True,
    )
    trained = [parameter for group in groups for parameter in group.parameters]
    total = epochs * steps_per_epoch
    warmup = max(1, min(warmup, total // 10))
    factor_at = SCHEDULES[options.schedule]
    first, curve, finished = 0, list[float](), False
    keeper, unwritten = options.checkpoint, None
    if keeper is not None and (kept := keeper.read(trained, optimizer)) is not None:
        first, curve, finished = kept
    step = first * steps_per_epoch
    with (
        memory_advice(title, options.lower, kept=lambda: _kept(options.checkpoint)),
        progress.task(title, total=total) as task,
    ):
        for epoch in range(first, 0 if finished else epochs):
            losses = []
            waiting = 0
            for place, batch in enumerate(batches(epoch)):
                factor = factor_at(step, total=total, warmup=warmup)
                for group, settings in zip(groups, optimizer.param_groups, strict=True):
                    settings["lr"] = group.learning_rate * factor
                with mixed(options.precision, trained[0].device.type):
                    loss = loss_of(batch)
                value = float(loss.detach())
                if not math.isfinite(value):
                    where = f"the loss of batch {place} is {value} at step {step} of epoch {epoch}"
                    raise _diverged(f"{title}: {where}", options, unwritten)
                if waiting == 0:
                    optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss if options.accumulate == 1 else loss / options.accumulate)
                waiting += 1
                if waiting == options.accumulate:
                    _stepped(optimizer, trained, clip, options)
                    waiting = 0
                losses.append(value)
                step += 1
                task.advance()
            if waiting:
                _rescale(trained, options.accumulate / waiting)
                _stepped(optimizer, trained, clip, options)
            if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
                where = f"after batch {len(losses) - 1}, step {step - 1} of epoch {epoch}"
                raise _diverged(f"{title}: what is trained is no number {where}", options, unwritten)
            curve.append(sum(losses) / max(1, len(losses)))
            task.note(f"loss {curve[-1]:.3f}")
            stops = options.validation is not None and options.validation.stops()
            finished = epoch + 1 == epochs or stops or _stands_still(curve, options.patience)
            if keeper is not None:
                state = keeper.state(
                    epoch=epoch, curve=curve, parameters=trained, optimizer=optimizer, finished=finished
                )
                written = (finished or keeper.due(epoch)) and keeper.write(state)
                unwritten = None if written else state or unwritten
            if finished:
                break
    if options.validation is not None:
        options.validation.restore()
    return curve


def _stepped(
    optimizer: torch.optim.Optimizer,
    trained: Sequence[nn.Parameter],
    clip: float | None,
    options: FitOptions,
) -> None:
    if options.adaptive_clip:
        clip_adaptively(trained, options.adaptive_clip)
    if clip is not None:
        nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()


@torch.no_grad()
def _rescale(trained: Sequence[nn.Parameter], factor: float) -> None:
    """Make gradients the mean of fewer batches than were to be accumulated."""
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _diverged(what: str, options: FitOptions, unwritten: Mapping[str, Any] | None) -> DivergedError:
    """Keep the last good state and return what to raise."""
    if options.checkpoint is not None:
        options.checkpoint.write(unwritten)
    return DivergedError(f"{what}{_kept(options.checkpoint)}; lower {options.rate}")


def _stands_still(curve: Sequence[float], patience: int) -> bool:
    if not patience or len(curve) <= patience:
        return False
    before = min(curve[:-patience])
    return min(curve[-patience:]) > before - 1e-3 * abs(before)


def _kept(keeper: Checkpoint | None) -> str:
    path = None if keeper is None else keeper.last_good()
    return "" if path is None else f"; the last good state is kept in {path}"


def shuffled(count: int, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Yield shuffled positions int64 [batch_size] of 0 to count - 1; a short rest is left out.

    Fewer than a batch are yielded as they are, so that a small set trains too.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if count < batch_size:
        yield order
        return
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def steps_in(count: int, batch_size: int) -> int:
    """Return how many batches :func:`shuffled` yields."""
    return max(1, count // batch_size)


def stretch_of(steps: int, most: int) -> int:
    """Return the longest stretch, of at most ``most`` steps, that whole ones of make up ``steps``."""
    return next(length for length in range(min(steps, most), 0, -1) if steps % length == 0)


@contextmanager
def seeded(seed: int, *, threads: int) -> Iterator[None]:
    """Run the body with torch seeded, deterministic, and on so many threads; put all back afterwards."""
    before = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic  # its attributes are set by a module class, unseen by mypy
    filling = switches.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        switches.fill_uninitialized_memory = False  # would cost a tenth of the time
        try:
            yield
        finally:
            switches.fill_uninitialized_memory = filling
            torch.use_deterministic_algorithms(deterministic)
            torch.set_num_threads(before)
