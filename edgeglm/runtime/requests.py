"""A request on its way through the runner, and the ways in which it can end without a result."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import EdgeglmError

Array = npt.NDArray[Any]
Sample = Mapping[str, Array]

_numbers = itertools.count()
_VIEWED = 2**16  # bytes of a batch of answers that one caller may keep alive
_SMALL = 65_536  # elements


class Priority(IntEnum):
    """The smaller, the sooner. Strict: a waiting request of a class goes before all of the next."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class RequestError(EdgeglmError):
    """Base of what a request can end in, apart from UserError for input that nobody could answer."""


class OverloadedError(RequestError):
    """The runner holds as many requests as it may, and was told to shed."""


class DeadlineExceededError(RequestError, TimeoutError):
    """The time that the caller allowed has passed."""


class RunnerClosedError(RequestError):
    """The runner was closed, or is being closed."""


class EngineFailedError(RequestError):
    """The engine raised, hung, or answered nonsense for this very request."""


def told(error: BaseException) -> str:
    """Return what an error is called and says; some cannot say it, and raise another one."""
    try:
        words = str(error)
    except Exception:
        words = "it cannot say more"
    return f"{type(error).__name__}: {words}"


def no_thread(what: str, error: Exception | None = None) -> EngineFailedError:
    """Return the error of what needs a thread where the process may have no more."""
    said = f": {error}" if error is not None and str(error) else ""
    failure = EngineFailedError(
        f"no thread for {what} can be started{said}; "
        "raise the limit of the process (ulimit -u, pids.max), or end other programs"
    )
    failure.__cause__ = error
    return failure


class Request:
    """One sample for one tower. The event loop settles it, exactly once.

    Attributes:
        number: Rises with each request: the order of arrival.
        tower: Which engine it is for.
        raw: A text, an image file, or None when ``sample`` came from the caller.
        sample: ``{input name: array without the batch axis}``, once it is prepared.
        length: Its size along the ragged axis, 0 for towers without one.
        bucket: What it may share a batch with.
        started: When the caller asked, in seconds of the monotonic clock.
        deadline: When the caller stops waiting, or None.
        home: Whoever counts it as held.
        settled: Whether it has ended. Set by the event loop only; workers read it under their lock.
    """

    # Defaults live in the class: what few requests need costs the others nothing.
    length: int = 0
    bucket: object = None
    settled: bool = False
    home: object = None
    timer: asyncio.TimerHandle | None = None
    future: asyncio.Future[dict[str, Array]] | None = None

    def __init__(
        self,
        tower: str,
        raw: object = None,
        sample: Sample | None = None,
        priority: int = Priority.NORMAL,
        started: float = 0.0,
        deadline: float | None = None,
    ) -> None:
        self.number = next(_numbers)
        self.tower = tower
        self.raw = raw
        self.sample = sample
        self.priority = priority
        self.started = started
        self.deadline = deadline


@dataclass(frozen=True)
class Failure:
    """A request that ended without a result, and why."""

    request: Request
    error: EdgeglmError


@dataclass
class Results:
    """How the requests of one call ended. Row i of each array in ``outputs`` answers ``answered[i]``.

    They travel as a batch and are cut apart at their destination, so that a worker's time goes into
    calls. Preparation gives no outputs: what it answered is ready for an engine.

    Attributes:
        feeds: What the engine was fed, if it may hold NaN and nobody has looked yet.
        seen: Whether somebody has looked for NaN in the outputs.
    """

    answered: Sequence[Request]
    outputs: Mapping[str, Array]
    failures: Sequence[Failure] = ()
    feeds: Mapping[str, Array] | None = None
    seen: bool = True
    again: Sequence[Request] = ()


def is_finite(array: Array) -> bool:
    """Say whether an array holds no NaN and no infinity; dtypes that cannot hold one always pass.

    A mask's bytes are searched: numpy's own way to ask whether all of a small mask is true takes longer than
    making it. Nor is a small array worth a call of BLAS, which lets go of the interpreter lock.
    """
    if array.dtype.kind not in "fc":
        return True
    mask = np.isfinite(array)
    return b"\0" not in mask.tobytes() if mask.size <= _SMALL else bool(mask.all())


def rows_of(results: Results) -> Iterable[dict[str, Array]]:
    """Cut the outputs of a call apart, one answer a request.

    Answers that are small together are views of one copy, which lives as long as the last of them. Of larger
    ones each row is copied, so that a caller who keeps one does not keep the batch in memory.
    """
    outputs = results.outputs
    if sum(array.nbytes for array in outputs.values()) > _VIEWED:
        return [
            {name: array[row].copy() for name, array in outputs.items()}
            for row in range(len(results.answered))
        ]
    if len(outputs) == 1:
        [(name, array)] = outputs.items()
        if array.ndim > 1:
            return [{name: row} for row in array.copy()]
    copies = {name: array.copy() for name, array in outputs.items()}
    return [{name: copy[row, ...] for name, copy in copies.items()} for row in range(len(results.answered))]


def late_text(request: Request, now: float) -> str:
    """Say how a deadline was missed, and what to do."""
    return (
        f"no answer within {(request.deadline or now) - request.started:.3g} s; "
        "allow more time, or lower the load"
    )
