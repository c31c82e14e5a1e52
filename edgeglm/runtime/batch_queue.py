"""What runs together, and when: buckets, priorities, preferred sizes and the delay.

No threads and no clock in here: callers hold a lock and say what time it is, so that every rule can be
tested as arithmetic. The rules are those of Triton's dynamic batcher (its model configuration pages:
``preferred_batch_size``, ``max_queue_delay_microseconds``, priority levels).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from edgeglm.core.errors import UserError
from edgeglm.runtime.plain import make_plain
from edgeglm.runtime.requests import Request

_LONGEST_DELAY = 3_600_000_000  # microseconds; a lock takes no time-out that is beyond all clocks


@dataclass(frozen=True, kw_only=True)
class BatchPolicy:
    """When waiting requests become a batch.

    Attributes:
        max_batch_size: The most samples in one call.
        preferred_batch_sizes: A bucket that holds this many goes at once, cut to the largest such size.
        max_queue_delay_microseconds: How long the oldest request may wait for company. At 0 a free
            engine takes what there is: batches then grow by themselves while the engine is busy. One
            with a deadline waits for company no longer than half of the time it has.
    """

    max_batch_size: int = 32
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        most: object = self.max_batch_size  # whatever a caller without types may give
        delay: object = self.max_queue_delay_microseconds
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise UserError(f"max_batch_size is {most!r}; give a whole number of at least 1")
        if not isinstance(delay, int) or isinstance(delay, bool) or delay < 0:
            raise UserError(f"max_queue_delay_microseconds is {delay!r}; give a whole number, 0 or more")
        if delay > _LONGEST_DELAY:
            raise UserError(
                f"max_queue_delay_microseconds is more than an hour; give at most {_LONGEST_DELAY}"
            )
        sizes: object = self.preferred_batch_sizes
        if not isinstance(sizes, (tuple, list)):
            raise UserError(
                f"preferred_batch_sizes is {sizes!r}; give whole numbers in a tuple, such as (4, 8)"
            )
        for size in sizes:
            if not isinstance(size, int) or isinstance(size, bool):
                raise UserError(f"preferred batch size {size!r} is no whole number; give one, such as 4")
            if not 1 <= size <= self.max_batch_size:
                raise UserError(
                    f"preferred batch size {size} is not in 1..{self.max_batch_size}; "
                    "change it or max_batch_size"
                )

    @cached_property
    def eager(self) -> bool:
        """Whether a free engine takes what there is, whatever it is."""
        return not self.preferred_batch_sizes and not self.max_queue_delay_microseconds

    @property
    def delay(self) -> float:
        """The delay in seconds."""
        return self.max_queue_delay_microseconds / 1e6

    def due(self, request: Request) -> float:
        """Return when a request stops waiting for company: the rest of its time is for the engine."""
        waits = self.delay
        if request.deadline is not None:
            waits = min(waits, (request.deadline - request.started) / 2)
        return request.started + waits

    def size_now(self, waiting: int, *, due: bool) -> int:
        """Return how many of ``waiting`` requests go now, of which one is ``due`` or none; 0: wait."""
        if waiting >= self.max_batch_size:
            return self.max_batch_size
        if fitting := [size for size in self.preferred_batch_sizes if size <= waiting]:
            return max(fitting)
        return waiting if due else 0


class _Bucket:
    """Requests that may share a batch: one first-in-first-out line a priority, none of them empty."""

    __slots__ = ("count", "known_due", "lines")

    def __init__(self) -> None:
        self.lines: dict[int, dict[int, Request]] = {}
        self.count = 0
        self.known_due: float | None = None

    def due(self, policy: BatchPolicy) -> float:
        """Return when the first of its requests stops waiting for company. Kept till one is taken out."""
        if self.known_due is None:
            self.known_due = min(
                policy.due(request) for line in self.lines.values() for request in line.values()
            )
        return self.known_due

    def size_now(self, policy: BatchPolicy, now: float) -> int:
        """Return how many of its requests go now."""
        if policy.eager:
            return min(self.count, policy.max_batch_size)
        # Of many that wait nobody asks when they are due: a full batch goes in any case.
        return policy.size_now(self.count, due=False) or policy.size_now(
            self.count, due=self.due(policy) <= now
        )

    def sooner(self, policy: BatchPolicy, request: Request) -> bool:
        """Note a newcomer, and say whether it is due before all others, as far as is known."""
        due = policy.due(request)
        if self.count == 1:
            self.known_due = due
        if self.known_due is None:
            return True
        sooner = due < self.known_due
        self.known_due = min(due, self.known_due)
        return sooner

    def first(self) -> Request:
        """Return the request that would go first."""
        return next(iter(self.lines[min(self.lines)].values()))

    def cut(self, size: int) -> list[Request]:
        taken: list[Request] = []
        for priority in sorted(self.lines):
            line = self.lines[priority]
            if len(line) <= size - len(taken):
                taken += line.values()
                del self.lines[priority]
            else:
                first = list(islice(line.values(), size - len(taken)))
                for request in first:
                    del line[request.number]
                taken += first
                break
        self.count -= len(taken)
        self.known_due = None
        return taken


class BatchQueue:
    """Waiting requests, by bucket. ``policies`` holds one policy a tower.

    ``timed`` says whether there may be deadlines to look at, in the queue or in what was taken last.
    """

    def __init__(self, policies: dict[str, BatchPolicy]) -> None:
        self._policies = policies
        self._buckets: dict[tuple[str, object], _Bucket] = {}
        self._count = 0
        self.timed = False

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for bucket in self._buckets.values():
            for line in bucket.lines.values():
                yield from line.values()

    def put(self, request: Request) -> bool:
        """Add a request. True if an idle worker should look.

        Its bucket was empty, is now full, or is due sooner than before.
        """
        key = (request.tower, request.bucket)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket()
        line = bucket.lines.get(request.priority)
        if line is None:
            line = bucket.lines[request.priority] = {}
        line[request.number] = request
        if not self._count:
            self.timed = False
        if request.deadline is not None:
            self.timed = True
        self._count += 1
        bucket.count = count = bucket.count + 1
        policy = self._policies[request.tower]
        sooner = not policy.eager and bucket.sooner(policy, request)
        return count == 1 or sooner or count >= policy.max_batch_size or count in policy.preferred_batch_sizes

    def remove(self, request: Request) -> bool:
        """Take out one that is no longer wanted; False if it was not waiting here."""
        bucket = self._buckets.get((request.tower, request.bucket))
        line = bucket.lines.get(request.priority) if bucket is not None else None
        if bucket is None or line is None or line.pop(request.number, None) is None:
            return False
        if not line:
            del bucket.lines[request.priority]
        bucket.count -= 1
        bucket.known_due = None
        self._count -= 1
        self._forget_empty(request)
        return True

    def take(self, now: float) -> list[Request]:
        """Cut the batch that should run now; empty if none should yet.

        Of the buckets that are ready the one with the most urgent request goes, and among equals the
        one whose request came first. Within it the more urgent go first, then the older.
        """
        best: tuple[tuple[int, float, int], _Bucket, int] | None = None
        for (tower, _), bucket in self._buckets.items():
            size = bucket.size_now(self._policies[tower], now)
            if size:
                if len(self._buckets) == 1:
                    best = ((0, 0.0, 0), bucket, size)  # no other to compare with
                    break
                first = bucket.first()
                rank = (first.priority, first.started, first.number)
                if best is None or rank < best[0]:
                    best = (rank, bucket, size)
        if best is None:
            return []
        batch = best[1].cut(best[2])
        self._count -= len(batch)
        self._forget_empty(batch[0])
        return batch

    def seconds_to_ready(self, now: float) -> float | None:
        """Return how long ``take`` stays empty if nothing arrives: 0 for now, None for ever."""
        waits = [
            0.0 if bucket.size_now(policy, now) else bucket.due(policy) - now
            for policy, bucket in (
                (self._policies[tower], bucket) for (tower, _), bucket in self._buckets.items()
            )
        ]
        return max(min(waits), 0.0) if waits else None

    def least_urgent(self) -> Request | None:
        """Return the newest request of the least urgent class, which stays."""
        newest = [
            next(reversed(line.values()))
            for bucket in self._buckets.values()
            for line in bucket.lines.values()
        ]
        return max(newest, key=lambda request: (request.priority, request.number), default=None)

    def evict(self, priority: int) -> Request | None:
        """Take out the newest request of the least urgent class, if it is less urgent than ``priority``."""
        worst = self.least_urgent()
        if worst is None or worst.priority <= priority:
            return None
        self.remove(worst)
        return worst

    def clear(self) -> list[Request]:
        """Take out everything, the oldest first."""
        everything = sorted(self, key=lambda request: request.number)
        self._buckets.clear()
        self._count = 0
        return everything

    def _forget_empty(self, request: Request) -> None:
        """Drop a bucket that ran empty, so that odd shapes leave nothing behind."""
        key = (request.tower, request.bucket)
        if key in self._buckets and not self._buckets[key].count:
            del self._buckets[key]
