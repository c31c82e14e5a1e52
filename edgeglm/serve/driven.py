"""A coroutine that runs without a task: from where it is made to its first wait, and on when that is over.

A task costs a turn of the loop before it begins, and the first step of a request is what puts it into a
batch. The coroutine must not ask for its task, as ``asyncio.timeout`` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Driven(Generic[T]):
    """Runs a coroutine in the running loop.

    Args:
        coroutine: Not begun yet.
        ended: Called once with its result, or with None and what it raised; maybe before this returns.
    """

    __slots__ = ("_awaited", "_coroutine", "_ended")

    def __init__(
        self, coroutine: Coroutine[Any, Any, T], ended: Callable[[T | None, BaseException | None], None]
    ) -> None:
        self._coroutine, self._ended = coroutine, ended
        self._awaited: asyncio.Future[Any] | None = None
        self._step(None)

    def cancel(self) -> None:
        """Cancel what it waits for, which raises CancelledError in it."""
        if self._awaited is not None:
            self._awaited.cancel()

    @property
    def waits(self) -> bool:
        """Whether it waits for something; else it has ended."""
        return self._awaited is not None

    def _step(self, _: asyncio.Future[Any] | None) -> None:
        self._awaited = None
        try:
            awaited = self._coroutine.send(None)  # a future gives its result, or raises, by itself
        except StopIteration as end:
            self._ended(end.value, None)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._ended(None, error)
        else:
            if awaited is None:  # a bare yield, as of ``asyncio.sleep(0)``
                awaited = asyncio.get_running_loop().create_future()
                awaited.set_result(None)
            awaited._asyncio_future_blocking = False  # as a task does: the wait was asked for, and is
            self._awaited = awaited
            awaited.add_done_callback(self._step)
