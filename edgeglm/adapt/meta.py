"""A first state of the heads from which every style, or every category, is learned in a few steps.

Reptile (Nichol et al., 2018): a few steps on one task, then a part of the way towards where they led.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress
from edgeglm.data.pairs import PairSet
from edgeglm.train.concepts import Concepts
from edgeglm.train.loop import DivergedError

B = TypeVar("B")
#: A task of fewer images than this teaches the heads nothing but them.
MIN_IMAGES = 8


def tasks_of(pairs: PairSet, concepts: Concepts, over: str) -> tuple[Tensor, ...]:
    """Return, for each style or category, the places of its labelled images, in name order.

    Raises:
        UserError: There are fewer than two of them with enough images.
    """
    rows = [pairs.rows[i] for i in concepts.image_N.tolist()]
    names = [row.domain if over == "styles" else row.category for row in rows]
    places = [[i for i, one in enumerate(names) if one == name] for name in sorted({*names} - {""})]
    found = tuple(torch.tensor(place) for place in places if len(place) >= MIN_IMAGES)
    if len(found) < 2:
        remedy = (
            'set it to "categories", with data.categories = true for icons or the key category in your lines'
            if over == "styles"
            else 'give more images of each category, or set it to "styles"'
        )
        raise UserError(
            f"teacher.multitask.reptile_over = {over!r} finds {len(found)} with {MIN_IMAGES} labelled images "
            f"or more, and needs two; {remedy}"
        )
    return found


def reptile(
    parameters: Sequence[nn.Parameter],
    tasks: Sequence[Tensor],
    batches: Callable[[Tensor, np.random.Generator], Iterable[B]],
    loss_of: Callable[[B], Tensor],
    *,
    rounds: int,
    reach: float,
    learning_rate: float,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Move ``parameters`` in place and return the mean loss of each round.

    Args:
        parameters: What is moved.
        tasks: The places of each task's images.
        batches: Task and a generator -> the batches of a round.
        loss_of: Batch -> scalar loss.
        rounds: How many tasks are visited, each as often as the others, in a seeded order.
        reach: Share of the way at first; it falls to nothing in a line.
        learning_rate: Of the steps on a task, by Adam without momentum as its authors take it.
        seed: Of the order and the batches.
        progress: Shows one step a round.

    Raises:
        DivergedError: A loss is not finite; it names batch and round.
    """
    rng = np.random.default_rng((seed, 777))
    order = [i for _ in range(-(-rounds // len(tasks))) for i in rng.permutation(len(tasks)).tolist()][
        :rounds
    ]
    curve: list[float] = []
    with progress.task("Teacher: first state", total=rounds) as bar:
        for place, task in enumerate(order):
            before = [parameter.detach().clone() for parameter in parameters]
            optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.0, 0.999))
            losses = []
            for batch in batches(tasks[task], rng):
                loss = loss_of(batch)
                losses.append(float(loss.detach()))
                if not np.isfinite(losses[-1]):
                    raise DivergedError(
                        f"Teacher: first state: the loss of batch {len(losses) - 1} is {losses[-1]} "
                        f"in round {place}; lower teacher.learning_rate"
                    )
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
            part = reach * (1.0 - place / rounds)
            with torch.no_grad():
                for parameter, first in zip(parameters, before, strict=True):
                    parameter.copy_(torch.lerp(first, parameter, part))
            curve.append(sum(losses) / max(1, len(losses)))
            bar.advance()
    for parameter in parameters:
        parameter.grad = None
    return curve
