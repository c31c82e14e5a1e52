"""Signals that close a runner: set in its event loop, and the former handlers put back at the end.

A loop has one handler a signal, and may have several runners: all that asked are told, and the last puts the
former handler back.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from threading import current_thread, main_thread
from typing import Any
from weakref import WeakSet

from edgeglm.core.errors import UserError
from edgeglm.runtime.plain import plain

_DEAF = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP")} - {None}
_everyone: WeakSet[Signals] = WeakSet()


class Signals:
    """What one runner does at signals, in one loop."""

    def __init__(self) -> None:
        self._former: dict[signal.Signals, Any] = {}  # kept by one of those who share a signal
        self._does: dict[signal.Signals, Callable[[], object]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def on(self, loop: asyncio.AbstractEventLoop, number: signal.Signals, do: Callable[[], object]) -> None:
        """Let a signal do something in the loop. Raises UserError where a loop cannot watch for signals."""
        number = plain(number)
        try:
            former = signal.getsignal(number)
        except (TypeError, ValueError) as error:
            raise UserError(f"{number!r} is no signal; give one, such as signal.SIGTERM") from error
        if number in _DEAF:
            raise UserError(f"no process hears {number!r}; give another signal, such as signal.SIGTERM")
        try:
            loop.add_signal_handler(number, _arrived, loop, number)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise UserError(
                f"this event loop cannot watch for signals ({str(error) or type(error).__name__}); "
                "run it in the main thread of a Unix process, or call close yourself"
            ) from error
        if not _who(loop, number):
            self._former[number] = former
        self._loop, self._does[number] = loop, do
        _everyone.add(self)

    def off(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do nothing any more. The last one of a loop puts back the handlers that were no event loop's.

        A loop that has ended gave its own up and put none back, or left them to swallow signals (uvloop).
        Those before come back if nobody set others meanwhile, in the main thread, the only one that may.
        """
        ended = loop.is_closed()
        numbers, self._does = list(self._does), {}
        for number in numbers:
            former = self._former.pop(number, None)
            if others := _who(loop, number):
                others[0]._former.setdefault(number, former)
                continue
            if not ended:
                loop.remove_signal_handler(number)
            elif not _is_left_by(loop, number) or current_thread() is not main_thread():
                continue
            room = str(getattr(former, "__module__", ""))
            if former is not None and not room.startswith(("asyncio.", "uvloop")):
                signal.signal(number, former)

    def told(self, number: signal.Signals) -> None:
        """Do what was asked for."""
        self._does[number]()

    def hears(self, loop: asyncio.AbstractEventLoop, number: signal.Signals) -> bool:
        """Say whether something was asked for in that loop."""
        return self._loop is loop and number in self._does


def _who(loop: asyncio.AbstractEventLoop, number: signal.Signals) -> list[Signals]:
    return [one for one in _everyone if one.hears(loop, number)]


def _is_left_by(loop: asyncio.AbstractEventLoop, number: signal.Signals) -> bool:
    """Say whether a signal has the handler that it has where a loop watched for it and has ended."""
    now = signal.getsignal(number)
    return now in (signal.SIG_DFL, signal.default_int_handler) or getattr(now, "__self__", None) is loop


def _arrived(loop: asyncio.AbstractEventLoop, number: signal.Signals) -> None:
    for one in _who(loop, number):
        one.told(number)
