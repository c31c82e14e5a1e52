"""Several coroutines of one request, begun in the turn of the loop in which they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from edgeglm.serve.driven import Driven

Work = Coroutine[Any, Any, Any]
End = asyncio.Future[Any]


async def all_of(calls: Sequence[Work]) -> list[Any]:
    """Await all; should one fail, cancel the others and raise its error.

    Each takes its first step at once and not, as a task of its own would, a turn later: a bundle that takes
    the place of another in between would answer in its name. None may ask for its task; see ``Driven``.
    """
    ends: list[End] = []
    begun: list[Driven[Any]] = []
    for call in calls:
        if ends and _error_of(ends[-1]) is not None:
            call.close()  # after one that failed at once none is begun
            continue
        ends.append(asyncio.get_running_loop().create_future())
        begun.append(Driven(call, _settling(ends[-1])))
    try:
        if ends:
            await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
        failed = next((error for end in ends if (error := _error_of(end)) is not None), None)
    finally:
        if any(one.waits for one in begun):
            for one in begun:
                one.cancel()
            await asyncio.wait(ends)
        for end in ends:
            _error_of(end)  # or the loop says that nobody asked for it
    if failed is not None:
        raise failed
    return [end.result() for end in ends]


def _error_of(end: End) -> BaseException | None:
    return end.exception() if end.done() else None


def _settling(end: End) -> Callable[[Any, BaseException | None], None]:
    def settle(result: Any, error: BaseException | None) -> None:
        if error is None:
            end.set_result(result)
        else:
            end.set_exception(error)

    return settle
