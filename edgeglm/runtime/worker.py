"""A worker: one thread of a crew, which serves batch after batch and knows what to do when one goes wrong."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.protocol import OutputsError
from edgeglm.runtime.requests import EngineFailedError, Failure, Request, Results, told

if TYPE_CHECKING:
    from edgeglm.runtime.crew import Crew

_SUSPICIOUS = 3  # batches in a row of which no request was answered
_LAST_WAIT = 5.0  # seconds, for all threads together


class Handler(Protocol):
    """What a worker does with a batch. Made, used and closed in the worker's own thread."""

    def run(self, batch: Sequence[Request]) -> Results:
        """Return how each request of the batch ended. May raise: the batch is then halved."""

    def check(self) -> None:
        """Raise if it cannot serve anybody any more."""

    def close(self) -> None:
        """Give the resources back."""


class Call:
    """A call in progress: when it began, whom it serves, and the parts of the batch yet to come."""

    __slots__ = ("batch", "since", "waiting")

    def __init__(
        self, since: float, batch: Sequence[Request], waiting: tuple[Sequence[Request], ...] = ()
    ) -> None:
        self.since, self.batch, self.waiting = since, batch, waiting


class Worker(threading.Thread):
    """One thread of a crew. Daemonic: one that hangs must not keep the process alive."""

    def __init__(self, crew: Crew, number: int) -> None:
        super().__init__(name=f"edgeglm-{crew.name}-{number}", daemon=True)
        self.crew = crew
        self.call: Call | None = None
        self.opening_since: float | None = time.monotonic()
        self.given_up = False
        self._failed_batches = 0

    def run(self) -> None:
        """Make the handler, take batches till the crew stops, close the handler."""
        try:
            handler = self.crew.make_handler()
        except BaseException as error:  # whoever waits for this worker must hear of it, whatever it was
            self.crew.worker_opened(self, error)
            return
        try:
            self.crew.worker_opened(self, None)
            batch = self.crew.next_batch(self)
            while batch:
                batch = self._served(batch, handler)
        except GivenUpError:
            pass
        except BaseException as error:  # a dead engine, or a fault of the crew: its callers must not wait
            self.crew.worker_died(self, error)
        finally:
            with contextlib.suppress(BaseException):
                handler.close()
            self.crew.worker_left(self)

    def _served(self, batch: Sequence[Request], handler: Handler) -> Sequence[Request]:
        """Serve a batch and return the next."""
        try:
            results = handler.run(batch)
        except BaseException as error:  # nothing may end this thread while requests wait for it
            self._serve_in_parts(batch, handler, error)
            return self.crew.next_batch(self)
        self._failed_batches = 0
        return self.crew.exchanged(self, results)

    def _serve_in_parts(self, batch: Sequence[Request], handler: Handler, error: BaseException) -> None:
        """Serve a batch that raised by halves, and by halves of these, so that a bad request fails alone."""
        parts, answered = _halves(batch), False
        if not parts:
            self.crew.end(self, _failed(batch[0], error))
        while parts:
            part = parts.pop()
            part = self.crew.begin(self, part, tuple(parts))
            if not part:  # nobody waits for it any more
                continue
            try:
                results = handler.run(part)
            except BaseException as again:
                if halves := _halves(part):
                    parts += halves
                    continue
                results = _failed(part[0], again)
            else:
                answered = True
            self.crew.end(self, results)
        self.call = None
        self._failed_batches = 0 if answered else self._failed_batches + 1
        if self._failed_batches >= _SUSPICIOUS:
            # Bad requests, or a dead engine? Harmless input tells: should it fail too, this worker goes.
            self._failed_batches = 0
            self.crew.begin(self, (), ())
            handler.check()
            self.call = None


class GivenUpError(Exception):
    """Ends the thread of a worker that was given up."""


def failure_from(error: BaseException) -> EdgeglmError:
    """Return the error that a caller gets for what an engine raised."""
    if isinstance(error, OutputsError):  # not the caller's fault
        return EngineFailedError(str(error))
    if isinstance(error, (UserError, EngineFailedError)):
        return error
    failure = EngineFailedError(
        f"the engine failed on this request: {told(error)}; look at the input, or run 'edgeglm doctor'"
    )
    failure.__cause__ = error
    return failure


def _halves(batch: Sequence[Request]) -> list[Sequence[Request]]:
    """Return the second half and the first, to be popped; nothing for a batch of one."""
    middle = len(batch) // 2
    return [batch[middle:], batch[:middle]] if middle else []


def _failed(request: Request, error: BaseException) -> Results:
    return Results((), {}, [Failure(request, failure_from(error))])


@atexit.register
def _let_go() -> None:
    """Wait for the calls of runners that were left open, as the process ends; Ctrl-C ends the wait.

    A thread that comes back from native code into an interpreter which has ended is unwound there. C++ and
    Rust answer that with an abort, so that a script with a good result would end with 134. What is not waited
    for is not woken, either.
    """
    everyone = [one for one in threading.enumerate() if isinstance(one, Worker)]
    workers = [one for one in everyone if not one.given_up]
    for crew in {one.crew for one in workers}:
        crew.clear()
        crew.stop()
    until = time.monotonic() + _LAST_WAIT
    with contextlib.suppress(KeyboardInterrupt):
        for worker in workers:
            worker.join(max(until - time.monotonic(), 0.0))
    if any(one.is_alive() for one in everyone):
        _leave_native_code_alone()


def _leave_native_code_alone() -> None:
    """End without the destructors of C++, which pull an engine's state away from under a call that runs.

    The call then fails, and returns. ``_exit`` is put before them, in glibc's way that tells it the code.
    """
    library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # not glibc
        library.on_exit(ctypes.cast(library._exit, ctypes.c_void_p), None)
