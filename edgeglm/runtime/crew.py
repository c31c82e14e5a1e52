"""A crew: threads that take batches from one queue, and know what to do when a batch goes wrong.

A batch that raises is halved and tried again, so a bad request fails alone. A call that hangs cannot be
stopped: its worker is given up, its requests fail, what it had not begun goes back to the queue, and
another worker takes its place.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.runtime.batch_queue import BatchPolicy, BatchQueue
from edgeglm.runtime.requests import DeadlineExceededError, EngineFailedError, Failure, Request, Results
from edgeglm.runtime.times import StageTimes, Times, added

_FOR_EVER = 1e9  # seconds
_SUSPICIOUS = 3  # batches in a row of which no request was answered


class Handler(Protocol):
    """What a worker does with a batch. Made, used and closed in the worker's own thread."""

    def run(self, batch: Sequence[Request]) -> Results:
        """Return how each request of the batch ended. May raise: the batch is then halved."""

    def check(self) -> None:
        """Raise if it cannot serve anybody any more."""

    def close(self) -> None:
        """Give the resources back."""


@dataclass(frozen=True)
class Call:
    """A call in progress: when it began, whom it serves, and the parts of the batch yet to come."""

    since: float
    batch: Sequence[Request]
    waiting: tuple[Sequence[Request], ...]


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
            while batch := self.crew.next_batch(self):
                self._serve(batch, handler)
        except _GivenUpError:
            pass
        except BaseException as error:  # a dead engine, or a fault of the crew: its callers must not wait
            self.crew.worker_died(self, error)
        finally:
            with contextlib.suppress(Exception):
                handler.close()
            self.crew.worker_left(self)

    def _serve(self, batch: Sequence[Request], handler: Handler) -> None:
        parts, answered = [batch], False
        while parts:
            part = parts.pop()
            self.crew.begin(self, part, tuple(parts))
            try:
                results = handler.run(part)
            except BaseException as error:  # nothing may end this thread while requests wait for it
                if len(part) > 1:
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]
                    continue
                results = Results((), {}, [Failure(part[0], _failure(error))])
            else:
                answered = True
            self.crew.end(self, results)
        self._failed_batches = 0 if answered else self._failed_batches + 1
        if self._failed_batches >= _SUSPICIOUS:
            # Bad requests, or a dead engine? Harmless input tells: should it fail too, this worker goes.
            self._failed_batches = 0
            self.crew.begin(self, (), ())
            handler.check()
            self.call = None


class Crew:
    """Workers around one queue.

    Args:
        name: What threads and errors call it.
        policies: A batch policy for each tower.
        make_handler: Called in each worker's thread.
        workers: How many.
        deliver: Takes results. Called in workers' threads.
        unoccupied: Called by a worker that is about to wait, and by one that ends.
        opened: Told of each worker that is ready (None) or could not be made (the error).
        died: Told when a worker ended that should not have.
        left: Told when the last worker has left. All are called in workers' threads.
    """

    def __init__(
        self,
        name: str,
        *,
        policies: dict[str, BatchPolicy],
        make_handler: Callable[[], Handler],
        workers: int,
        deliver: Callable[[Results], None],
        unoccupied: Callable[[], None],
        opened: Callable[[Crew, BaseException | None], None],
        died: Callable[[Crew], None],
        left: Callable[[Crew], None],
    ) -> None:
        self.name = name
        self.make_handler = make_handler
        self.size = workers
        self._batches: Counter[tuple[str, int]] = Counter()
        self._times: StageTimes = {}
        self._deliver, self._opened, self._died, self._left = deliver, opened, died, left
        self._unoccupied = unoccupied
        self._queue = BatchQueue(policies)
        self._lock = threading.Lock()  # taken by itself where nobody waits: a Condition's way to it is longer
        self._changed = threading.Condition(self._lock)
        self._workers: set[Worker] = set()
        self._idle = 0
        self._made = 0
        self._hurrying = False
        self._stopping = False

    def __len__(self) -> int:
        """Return how many requests wait."""
        return len(self._queue)

    @property
    def alive(self) -> int:
        """How many workers there are that were not given up, those that are still opening included."""
        return len(self._workers)

    def batch_counts(self) -> Counter[tuple[str, int]]:
        """Return how many calls there were, by tower and batch size."""
        with self._lock:
            return self._batches.copy()

    def times(self) -> StageTimes:
        """Return how long calls took, and how old the oldest request of each was as it began.

        Keys are (stage, tower); stages are this crew's name, and the same with ``-wait``.
        """
        total: StageTimes = {}
        with self._lock:
            added(total, self._times)
        return total

    def start(self) -> None:
        """Start as many workers as are missing."""
        with self._lock:
            missing = 0 if self._stopping else self.size - len(self._workers)
            fresh = [Worker(self, self._made + i) for i in range(missing)]
            self._made += len(fresh)
            self._workers.update(fresh)
        for worker in fresh:
            worker.start()

    def put(self, requests: Sequence[Request]) -> None:
        """Queue requests; those that have ended meanwhile are dropped."""
        queue = self._queue
        with self._lock:
            for request in requests:
                if not request.settled and queue.put(request) and self._idle:
                    self._changed.notify()

    def remove(self, request: Request) -> bool:
        """Take out a request that is no longer wanted; False if it is not waiting here."""
        with self._lock:
            return self._queue.remove(request)

    def evict(self, priority: int) -> Request | None:
        """Take out the newest request less urgent than ``priority``, if any waits."""
        with self._lock:
            return self._queue.evict(priority)

    def clear(self) -> list[Request]:
        """Take out all that wait."""
        with self._lock:
            return self._queue.clear()

    def hurry(self) -> None:
        """Keep nobody waiting for company any more: what waits is the last there is."""
        with self._lock:
            self._hurrying = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Let the workers finish what waits and leave. Returns at once; ``left`` is told at the end."""
        with self._lock:
            self._hurrying = self._stopping = True
            self._changed.notify_all()

    def give_up_hung(self, before: float, opening_before: float) -> list[Call]:
        """Stop counting on workers whose call, or opening, began before a point in time.

        Returns the calls, an opening as one for nobody. What a worker had not begun goes back to the
        queue. ``start`` makes the replacements.
        """
        with self._lock:
            calls = []
            for worker in tuple(self._workers):
                call = worker.call
                if worker.opening_since is not None and worker.opening_since < opening_before:
                    call = Call(worker.opening_since, (), ())
                elif call is None or call.since >= before:
                    continue
                calls.append(call)
                self._part_with(worker, call)
        return calls

    def worker_died(self, worker: Worker, error: BaseException) -> None:
        """Fail the requests that a worker was busy with when it ended; the rest goes back to the queue.

        A worker that was busy with none fell over the queue itself: all that wait fail then, for the next
        worker would fall over the same.
        """
        with self._lock:
            if worker.given_up:
                return
            call = worker.call or Call(0.0, self._queue.clear(), ())
            self._part_with(worker, call)
        self._deliver(Results((), {}, [Failure(request, _failure(error)) for request in call.batch]))
        self._died(self)

    def _part_with(self, worker: Worker, call: Call) -> None:
        worker.given_up = True
        self._workers.discard(worker)
        for request in (request for part in call.waiting for request in part):
            if not request.settled:
                self._queue.put(request)
        self._changed.notify_all()

    def next_batch(self, worker: Worker) -> list[Request]:
        """Wait for a batch; empty once the crew stops and nothing waits. Called by workers."""
        with self._lock:
            while True:
                if worker.given_up:
                    return []
                now = time.monotonic()
                batch = self._queue.take(now + _FOR_EVER if self._hurrying else now)
                if batch:
                    if self._idle and self._queue.seconds_to_ready(now) == 0:
                        self._changed.notify()
                    late = [r for r in batch if r.deadline is not None and r.deadline <= now]
                    if late and not (batch := self._without_late(batch, late, now)):
                        continue
                    return batch
                if self._stopping:
                    return []
                wait = self._queue.seconds_to_ready(now)
                self._unoccupied()
                self._idle += 1
                try:
                    self._changed.wait(wait)
                finally:
                    self._idle -= 1

    def begin(self, worker: Worker, batch: Sequence[Request], waiting: tuple[Sequence[Request], ...]) -> None:
        """Note that a call begins. Called by workers; ends one that was given up."""
        with self._lock:
            if worker.given_up:
                raise _GivenUpError
            worker.call = Call(time.monotonic(), batch, waiting)
            if batch:
                self._batches[batch[0].tower, len(batch)] += 1

    def end(self, worker: Worker, results: Results) -> None:
        """Deliver the results of a call, and note that it ended. Called by workers."""
        with self._lock:
            if worker.given_up:
                raise _GivenUpError
            if worker.call is not None and worker.call.batch:
                self._note(worker.call)
        self._deliver(results)
        worker.call = None  # only now: should delivery fail, the call's requests are known

    def _note(self, call: Call) -> None:
        tower = call.batch[0].tower
        waited = call.since - min(request.started for request in call.batch)
        for stage, seconds in ((self.name, time.monotonic() - call.since), (f"{self.name}-wait", waited)):
            times = self._times.get((stage, tower))
            if times is None:
                times = self._times[stage, tower] = Times()
            times.observe(seconds)

    def worker_opened(self, worker: Worker, error: BaseException | None) -> None:
        """Pass on that a worker is ready, or why it never will be."""
        with self._lock:
            worker.opening_since = None
            if error is not None:
                self._workers.discard(worker)
            if worker.given_up:
                return
            last = self._stopping and not self._workers
        self._opened(self, error)
        if error is not None and last:
            self._left(self)

    def worker_left(self, worker: Worker) -> None:
        """Note that a worker's thread ends, and pass on if it was the last."""
        with self._lock:
            self._workers.discard(worker)
            last = self._stopping and not self._workers
        self._unoccupied()
        if last and not worker.given_up:
            self._left(self)

    def _without_late(self, batch: list[Request], late: list[Request], now: float) -> list[Request]:
        """Drop those whose deadline passed while they waited: the engine's time is for the others."""
        failures = [Failure(r, DeadlineExceededError(late_text(r, now))) for r in late]
        self._deliver(Results((), {}, failures))
        return [request for request in batch if request not in late]


def late_text(request: Request, now: float) -> str:
    """Say how a deadline was missed, and what to do."""
    return (
        f"no answer within {(request.deadline or now) - request.started:.3g} s; "
        "allow more time, or lower the load"
    )


class _GivenUpError(Exception):
    """Ends the thread of a worker that was given up."""


def _failure(error: BaseException) -> EdgeglmError:
    if isinstance(error, (UserError, EngineFailedError)):
        return error
    failure = EngineFailedError(
        f"the engine failed on this request: {type(error).__name__}: {error}; look at the input, "
        "or run 'edgeglm doctor'"
    )
    failure.__cause__ = error
    return failure
