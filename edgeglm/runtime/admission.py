"""Places in a runner: how many requests it holds, and who waits for a place. For one event loop."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable


class Admission:
    """A counter with a limit, and a line of those who wait, the more urgent first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self._line: list[tuple[int, int, asyncio.Future[None]]] = []
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
            waiter = heapq.heappop(self._line)[2]
            if not waiter.done():
                self.held += 1
                waiter.set_result(None)

    async def place(self, priority: int, deadline: float | None) -> None:
        """Wait for a place and take it. Raises TimeoutError at ``deadline`` (monotonic seconds)."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._line, (priority, next(self._numbers), waiter))
        timer = None
        if deadline is not None:
            timer = loop.call_later(deadline - time.monotonic(), _time_out, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release()  # the place came in the same moment
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._tidy()

    def refuse(self, error: Callable[[], Exception]) -> None:
        """Send all away who wait, each with an error of its own."""
        line, self._line = self._line, []
        for _, _, waiter in line:
            if not waiter.done():
                waiter.set_exception(error())

    def _tidy(self) -> None:
        """Forget those at the head who no longer wait, so that newcomers need not queue behind them."""
        while self._line and self._line[0][2].done():
            heapq.heappop(self._line)


def _time_out(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
