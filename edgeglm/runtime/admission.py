"""Places in a runner: how many requests it holds, and who waits for a place. For one event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable


class Admission:
    """A counter with a limit, and a line of those who wait, the more urgent first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self.promised = 0  # of these: given to one in the line, who has not gone on yet
        self._line: dict[
            int, dict[int, asyncio.Future[None]]
        ] = {}  # by priority, then by arrival; none empty
        self._numbers = itertools.count()

    def admit(self) -> bool:
        """Take a place if one is free and nobody waits for it."""
        if self.held >= self.capacity or self._line:
            return False
        self.held += 1
        return True

    def release(self, places: int = 1) -> None:
        """Give places back: the first in the line get them."""
        self.held -= places
        while self._line and self.held < self.capacity:
            priority = min(self._line)
            number = next(iter(self._line[priority]))
            waiter = self._line[priority][number]
            if not waiter.done():
                self.held += 1
                self.promised += 1
                waiter.set_result(None)
            self._leave(priority, number)

    async def place(self, priority: int, deadline: float | None) -> None:
        """Wait for a place and take it. Raises TimeoutError at ``deadline`` (monotonic seconds)."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        number = next(self._numbers)
        self._line.setdefault(priority, {})[number] = waiter
        timer = None
        if deadline is not None:
            timer = loop.call_later(deadline - time.monotonic(), _time_out, waiter)
        try:
            await waiter
            self.promised -= 1
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.promised -= 1
                self.release()  # the place came in the same moment
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._leave(priority, number)

    def refuse(self, error: Callable[[], Exception]) -> None:
        """Send all away who wait, each with an error of its own."""
        line, self._line = self._line, {}
        for waiter in (waiter for waiters in line.values() for waiter in waiters.values()):
            if not waiter.done():
                waiter.set_exception(error())

    def _leave(self, priority: int, number: int) -> None:
        """Take one out of the line, wherever in it, if it is there."""
        waiters = self._line.get(priority, {})
        waiters.pop(number, None)
        if not waiters:
            self._line.pop(priority, None)


def _time_out(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
