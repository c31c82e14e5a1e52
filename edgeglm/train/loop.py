"""The one training loop: AdamW, warm-up and cosine decay, and a stop at the first loss that is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgeglm.core.errors import EdgeglmError
from edgeglm.core.progress import Progress

B = TypeVar("B")


class DivergedError(EdgeglmError):
    """A loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a peak learning rate and a weight decay."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


def warmup_cosine(step: int, *, total: int, warmup: int) -> float:
    """Return the factor of the peak rate at a step counted from 0: a linear rise, then half a cosine to 0.

    Source: Loshchilov & Hutter, SGDR (2017), without restarts; the warm-up of Goyal et al. (2017).
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


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

    Raises:
        DivergedError: A loss is not finite; it names epoch and step.
    """
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
    curve, step = [], 0
    with progress.task(title, total=total) as task:
        for epoch in range(epochs):
            losses = []
            for batch in batches(epoch):
                factor = warmup_cosine(step, total=total, warmup=warmup)
                for group, settings in zip(groups, optimizer.param_groups, strict=True):
                    settings["lr"] = group.learning_rate * factor
                loss = loss_of(batch)
                value = float(loss.detach())
                if not math.isfinite(value):
                    where = f"at step {step} of epoch {epoch}"
                    raise DivergedError(f"{title}: the loss is {value} {where}; lower the learning rate")
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                if clip is not None:
                    nn.utils.clip_grad_norm_(trained, clip)
                optimizer.step()
                losses.append(value)
                step += 1
                task.advance()
            curve.append(sum(losses) / max(1, len(losses)))
            task.note(f"loss {curve[-1]:.3f}")
    return curve


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
