"""Signals that close a runner: set in its event loop, and the former handlers put back at the end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

from edgeglm.core.errors import UserError


class Signals:
    """The signals of one loop that have a handler of ours, and the handlers that they had."""

    def __init__(self) -> None:
        self._former: dict[signal.Signals, Any] = {}

    def on(self, loop: asyncio.AbstractEventLoop, number: signal.Signals, do: Callable[[], object]) -> None:
        """Let a signal do something in the loop. Raises UserError where a loop cannot watch for signals."""
        former = signal.getsignal(number)
        try:
            loop.add_signal_handler(number, do)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise UserError(
                f"this event loop cannot watch for signals ({str(error) or type(error).__name__}); "
                "run it in the main thread of a Unix process, or call close yourself"
            ) from error
        self._former.setdefault(number, former)

    def off(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take our handlers away, and put back those that were no event loop's."""
        for number, former in self._former.items():
            loop.remove_signal_handler(number)
            room = str(getattr(former, "__module__", ""))
            if former is not None and not room.startswith(("asyncio.", "uvloop")):
                signal.signal(number, former)
        self._former.clear()
