"""Calls from threads into an event loop, which choose when to wake it.

A loop that is woken takes the interpreter lock as soon as the sender lets go of it, be it for the length of
one copy in numpy, and cuts a whole batch of answers apart before the sender may go on. An engine's thread
therefore puts its answers here without a sound, joins its next batch, and rings as it enters the engine,
which runs without the lock. For the same reason that bell is rung through ``ctypes.PyDLL``, which keeps the
lock: ``loop.call_soon_threadsafe`` sends through a socket and lets go of it. A thread that has nothing more
to do rings through ``ctypes.CDLL``, which gives the lock up before the loop is awake: a loop that wakes to a
lock held by another goes to sleep a second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

Letter = tuple[Callable[..., None], tuple[object, ...]]


class Mailbox:
    """Runs functions in an event loop for other threads, in the order in which they were posted.

    Made and closed in the loop. Where there is no eventfd (macOS), or the loop watches no files (Windows), it
    is ``call_soon_threadsafe`` by another name.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()  # between those who ring and the one who takes the bell away
        self._letters: deque[Letter] = deque()
        self._woken = False
        self._open = True
        self._bell: _Bell | None = None
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a process that has too many files open needs no bell
                self._bell = self._hung_up()

    def _hung_up(self) -> _Bell | None:
        bell = _Bell()
        try:
            self._loop.add_reader(bell.number, self._read)
        except (NotImplementedError, OSError):
            bell.close()
            return None
        return bell

    def put(self, function: Callable[..., None], *arguments: object) -> None:
        """Let a function be run in the loop once somebody rings. Does nothing in a closed mailbox."""
        if self._open:
            self._letters.append((function, arguments))

    def ring(self) -> None:
        """Wake the loop if something was put here that it was not woken for. Cheap if not.

        For a thread about to enter an engine: it keeps the interpreter lock.
        """
        if self._letters and not self._woken:
            self._ring(idle=False)

    def ring_idle(self) -> None:
        """Do what ``ring`` does, for a thread that has nothing more to do: it gives the lock up first."""
        if self._letters and not self._woken:
            self._ring(idle=True)

    def _ring(self, *, idle: bool) -> None:
        with self._lock:
            if not self._open:
                return
            # Before the letters are looked at again: the loop lowers this flag, then reads them all.
            self._woken = True
            if self._bell is not None:
                self._bell.ring(idle=idle)
                return
        with contextlib.suppress(RuntimeError):  # a loop that is gone needs no telling
            self._loop.call_soon_threadsafe(self._read)

    def read(self) -> None:
        """Run what was put here, rung for or not. In the loop."""
        self._run()

    def post(self, function: Callable[..., None], *arguments: object) -> None:
        """Run a function in the loop soon. Does nothing once the mailbox or the loop is closed."""
        self.put(function, *arguments)
        self.ring()

    def close(self) -> None:
        """Run what was posted, and take nothing more. A second call does nothing."""
        with self._lock:
            self._open = False
            bell, self._bell = self._bell, None
        if self._loop.is_closed():  # who waited for letters has ended with it
            self._letters.clear()
        elif bell is not None:
            self._loop.remove_reader(bell.number)
        if bell is not None:
            bell.close()
        self._run()

    def _read(self) -> None:
        if self._bell is not None:
            self._bell.silence()
        self._run()

    def _run(self) -> None:
        self._woken = False
        letters = self._letters
        for _ in range(len(letters)):  # what comes meanwhile has rung again
            function, arguments = letters.popleft()
            try:
                function(*arguments)
            except Exception as error:  # the letters after it must be read all the same
                words = f"{function} failed in the event loop"
                self._loop.call_exception_handler({"message": words, "exception": error})


class _Bell:
    """An eventfd. Owned by a file object, so that a forgotten one is closed, with a ResourceWarning."""

    def __init__(self) -> None:
        self.number = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._file = os.fdopen(self.number, "rb", buffering=0)
        self._write: Any = ctypes.PyDLL(None).eventfd_write
        self._count = ctypes.byref(ctypes.c_uint64())
        self._read: Any = ctypes.PyDLL(None).eventfd_read
        self._read.argtypes = (ctypes.c_int, ctypes.c_void_p)
        self._write_idle: Any = ctypes.CDLL(None).eventfd_write
        self._write.argtypes = self._write_idle.argtypes = (ctypes.c_int, ctypes.c_uint64)

    def ring(self, *, idle: bool) -> None:
        (self._write_idle if idle else self._write)(self.number, 1)

    def silence(self) -> None:
        self._read(self.number, self._count)

    def close(self) -> None:
        self._file.close()
