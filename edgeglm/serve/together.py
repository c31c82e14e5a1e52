"""Several coroutines of one request, begun in the turn of the loop in which they are asked for."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator, Sequence
from contextlib import suppress
from typing import Any

Work = Coroutine[Any, Any, Any]


async def all_of(calls: Sequence[Work]) -> list[Any]:
    """Await all; should one fail, cancel the others and raise its error.

    Each takes its first step at once and not, as a task of its own would, a turn later: a bundle that takes
    the place of another in between would answer in its name. In that step it must not ask for its task, as
    ``asyncio.timeout`` does.
    """
    tasks: list[asyncio.Task[Any]] = []
    try:
        steps = [_first_step(call) for call in calls]
        tasks = [asyncio.ensure_future(_rest(call, *step)) for call, step in zip(calls, steps, strict=True)]
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for call in calls:  # of a task that was cancelled before it began, the call has not heard
            _end(call)
        raise


def _first_step(call: Work) -> tuple[bool, Any]:
    """Return whether it has ended, and what it gave; else what it waits for."""
    try:
        return False, call.send(None)
    except StopIteration as end:
        return True, end.value


async def _rest(call: Work, ended: bool, given: Any) -> Any:
    return given if ended else await _going_on(call, given)


@types.coroutine
def _going_on(call: Work, waits_for: Any) -> Generator[Any, Any, Any]:
    while True:
        error = sent = None
        try:
            sent = yield waits_for
        except BaseException as thrown:
            error = thrown
        try:
            waits_for = call.send(sent) if error is None else call.throw(error)
        except StopIteration as end:
            return end.value


def _end(call: Work) -> None:
    with suppress(asyncio.CancelledError, StopIteration, RuntimeError):
        call.throw(asyncio.CancelledError())
