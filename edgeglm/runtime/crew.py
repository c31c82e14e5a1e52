"""A crew: threads that take batches from one queue.

A batch that raises is halved and tried again, so a bad request fails alone. A call that hangs cannot be
stopped: its worker is given up, its requests fail, what it had not begun goes back to the queue, and
another worker takes its place.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from edgeglm.runtime.batch_queue import BatchPolicy, BatchQueue
from edgeglm.runtime.requests import DeadlineExceededError, Failure, Request, Results, late_text, no_thread
from edgeglm.runtime.times import StageTimes, Times, added
from edgeglm.runtime.worker import Call, GivenUpError, Handler, Worker, failure_from

_FOR_EVER = 1e9  # seconds


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
        self.name, self._wait_stage = name, f"{name}-wait"
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
        self._left_behind: set[Worker] = set()
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

    @property
    def left_behind(self) -> int:
        """How many workers were given up and have not come back: each keeps a thread and what it opened."""
        return len(self._left_behind)

    def requests(self) -> set[Request]:
        """Return all that wait here or are in a call, the parts of a halved batch included."""
        with self._lock:
            calls = [worker.call for worker in self._workers if worker.call is not None]
            parts = [part for call in calls for part in (call.batch, *call.waiting)]
            return set(self._queue).union(*parts)

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
        """Start as many workers as are missing. One without a thread is told as one that cannot be made."""
        with self._lock:
            missing = 0 if self._stopping else self.size - len(self._workers)
            fresh = [Worker(self, self._made + i) for i in range(missing)]
            self._made += len(fresh)
            self._workers.update(fresh)
        for worker in fresh:
            try:
                worker.start()
            except Exception as error:  # a MemoryError, too: it counted as one that opens
                self.worker_opened(worker, no_thread(self.name, error))

    def put(self, requests: Sequence[Request]) -> None:
        """Queue requests; those that have ended meanwhile are dropped."""
        queue = self._queue
        with self._lock:
            for request in requests:
                if not request.settled and queue.put(request) and self._idle:
                    self._changed.notify()

    def put_one(self, request: Request) -> None:
        """Queue one request that has just come."""
        with self._lock:
            if self._queue.put(request) and self._idle:
                self._changed.notify()

    def remove(self, request: Request) -> bool:
        """Take out a request that is no longer wanted; False if it is not waiting here."""
        with self._lock:
            return self._queue.remove(request)

    def least_urgent(self) -> Request | None:
        """Return the newest of the least urgent requests that wait, which stays."""
        with self._lock:
            return self._queue.least_urgent()

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
                    call = Call(worker.opening_since, ())
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
            call = worker.call or Call(0.0, self._queue.clear())
            self._part_with(worker, call)
        self._deliver(Results((), {}, [Failure(request, failure_from(error)) for request in call.batch]))
        self._died(self)

    def _part_with(self, worker: Worker, call: Call) -> None:
        worker.given_up = True
        self._workers.discard(worker)
        self._left_behind.add(worker)
        for request in (request for part in call.waiting for request in part):
            if not request.settled:
                self._queue.put(request)
        self._changed.notify_all()

    def exchanged(self, worker: Worker, results: Results) -> Sequence[Request]:
        """Deliver the results of a whole batch and return the next one. Called by workers."""
        if worker.given_up:
            raise GivenUpError
        self._deliver(results)
        done, worker.call = worker.call, None  # only now: should delivery fail, the call's requests are known
        return self.next_batch(worker, done)

    def next_batch(self, worker: Worker, done: Call | None = None) -> Sequence[Request]:
        """Wait for a batch, and note that its call begins; empty once the crew stops and nothing waits.

        Called by workers. ``done`` is the call that has just ended, if it is yet to be noted.
        """
        told = not len(self._queue)
        if told:  # most likely nobody waits: who is answered should not wait for these books
            self._unoccupied()
        while True:
            with self._lock:
                if worker.given_up:
                    return ()
                now = time.monotonic()
                if done is not None:
                    self._note(done, now)
                    done = None
                batch = self._queue.take(now + _FOR_EVER if self._hurrying else now)
                if batch:
                    if self._idle and self._queue.seconds_to_ready(now) == 0:
                        self._changed.notify()
                    if self._queue.timed:
                        late = [r for r in batch if r.deadline is not None and r.deadline <= now]
                        if late and not (batch := self._without_late(batch, late, now)):
                            continue
                    worker.call = Call(now, batch)
                    self._batches[batch[0].tower, len(batch)] += 1
                    return batch
                if self._stopping:
                    return ()
                if told:
                    self._idle += 1
                    try:
                        self._changed.wait(self._queue.seconds_to_ready(now))
                    finally:
                        self._idle -= 1
                    told = False
                    continue
            self._unoccupied()  # not under the lock: it lets others run
            told = True

    def begin(
        self, worker: Worker, batch: Sequence[Request], waiting: tuple[Sequence[Request], ...]
    ) -> Sequence[Request]:
        """Note that a call begins, and return those of its requests that have not ended meanwhile.

        Called by workers; ends one that was given up.
        """
        with self._lock:
            if worker.given_up:
                raise GivenUpError
            now = time.monotonic()
            worker.call = Call(now, batch, waiting)  # all of it: should delivery fail, they are known
            wanted = [request for request in batch if not request.settled]
            if late := [r for r in wanted if r.deadline is not None and r.deadline <= now]:
                wanted = self._without_late(wanted, late, now)
            if wanted:
                worker.call = Call(now, wanted, waiting)
                self._batches[wanted[0].tower, len(wanted)] += 1
            return wanted

    def end(self, worker: Worker, results: Results) -> None:
        """Deliver the results of a call, and note that it ended. Called by workers."""
        with self._lock:
            if worker.given_up:
                raise GivenUpError
            if worker.call is not None and worker.call.batch:
                self._note(worker.call, time.monotonic())
        self._deliver(results)
        # Only now: should delivery fail, the call's requests are known. Those of parts to come always are.
        waiting = worker.call.waiting if worker.call is not None else ()
        worker.call = Call(time.monotonic(), (), waiting) if waiting else None

    def _note(self, call: Call, now: float) -> None:
        tower = call.batch[0].tower
        waited = call.since - call.batch[0].started
        for stage, seconds in ((self.name, now - call.since), (self._wait_stage, waited)):
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
                self._left_behind.discard(worker)
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
            self._left_behind.discard(worker)
            last = self._stopping and not self._workers
        self._unoccupied()
        if last and not worker.given_up:
            self._left(self)

    def _without_late(self, batch: list[Request], late: list[Request], now: float) -> list[Request]:
        """Drop those whose deadline passed while they waited: the engine's time is for the others."""
        failures = [Failure(r, DeadlineExceededError(late_text(r, now))) for r in late]
        self._deliver(Results((), {}, failures))
        return [request for request in batch if request not in late]
