"""Where a runner was opened: one event loop, in one process. It answers nowhere else."""

from __future__ import annotations

import asyncio
import os
from threading import get_ident

from edgeglm.core.errors import UserError

_forks = 0  # how many lie between the process that imported this and this one


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class Residence:
    """The running event loop and its process. Made in the loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._pid, self._thread, self._forks = os.getpid(), get_ident(), _forks

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process in which it was made."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise UserError in a forked child, where locks may be held by threads that are not there."""
        if self.forked:
            raise UserError("the runner was opened before a fork, its threads stayed behind; open one here")

    def check(self, remedy: str = "open one in this loop") -> None:
        """Raise UserError in another process or another event loop.

        To ask which loop runs, and in which process, takes system calls, a quarter of a request's time. So
        the thread, the loop's own word and a count of forks are asked first.
        """
        if get_ident() == self._thread and self._forks == _forks and self.loop.is_running():
            return
        self.check_process()
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            raise UserError("no event loop runs in this thread; ask the runner in its own") from None
        if here is not self.loop:
            raise UserError(f"the runner belongs to another event loop; {remedy}")
