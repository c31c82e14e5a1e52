"""One set of towers in service: its two crews, from loading to the last request. A hot swap makes another."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from edgeglm.core.errors import EdgeglmError, UserError, unknown_name
from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerContract
from edgeglm.runtime.crew import Crew
from edgeglm.runtime.handlers import EngineHandler, PreparationHandler, forwarding
from edgeglm.runtime.mailbox import Mailbox
from edgeglm.runtime.opening import OpenedSource
from edgeglm.runtime.requests import EngineFailedError, Request, Results, no_thread, told

# Raw inputs taken at once: texts are quick, and a decoded image is worth a hop of its own.
_TEXTS_AT_ONCE, _IMAGES_AT_ONCE = 32, 2
_FORGIVEN_AFTER = 3600.0  # seconds, for a worker that hung and came back, or died


class Generation:
    """Towers, their crews, and the requests they hold. All methods run in the event loop.

    Args:
        source: The towers; given back when the last engine is closed.
        config: The runner's.
        deliver: Takes results, in the event loop.
        fail: Ends one request with an error, in the event loop.
    """

    def __init__(
        self,
        source: OpenedSource,
        config: RunnerConfig,
        *,
        deliver: Callable[[Results], None],
        fail: Callable[[Request, EdgeglmError], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._mail = Mailbox(self._loop)
        self.source, self._config, self._fail = source, config, fail
        sources = source.towers
        self.contracts: dict[str, TowerContract] = {}
        self.held: set[Request] = set()
        self._missing: set[Request] = set()  # of these, at the last look, in no crew's hands
        self.broken: EdgeglmError | None = None
        self._reopens = False  # whether it is broken for want of a worker, and may be mended
        self._replaced: Counter[str] = Counter()
        self._lately: defaultdict[str, list[float]] = defaultdict(list)
        self._next_try = 0.0
        self._emptied: asyncio.Future[None] | None = None
        self._opening: asyncio.Future[None] = self._loop.create_future()
        self._to_open = config.instances
        self._left: dict[str, asyncio.Future[None]] = {}

        def answered(results: Results) -> None:
            self._mail.put(deliver, results)  # the crew rings, at a moment that suits the engine

        def delivered(results: Results) -> None:
            self._tell(deliver, results)

        policies = {name: config.policy(name) for name in sources}
        self.inference = Crew(
            "engine",
            policies=policies,
            make_handler=lambda: EngineHandler(
                sources, config.warm_up_batches(sources), self.contracts, before_call=self._mail.ring
            ),
            workers=config.instances,
            deliver=answered,
            unoccupied=self._mail.ring_idle,
            opened=lambda crew, error: self._tell(self._worker_opened, crew, error),
            died=lambda crew: self._tell(self._replace, crew, 1),
            left=lambda crew: self._tell(self._crew_left, crew),
        )
        self.preparation = Crew(
            "preparation",
            policies={
                name: BatchPolicy(max_batch_size=_IMAGES_AT_ONCE if name == "image" else _TEXTS_AT_ONCE)
                for name in sources
            },
            make_handler=lambda: PreparationHandler(sources, self.contracts),
            workers=config.preparation_threads,
            deliver=forwarding(delivered, self.inference.put),
            unoccupied=self._mail.ring_idle,
            opened=lambda crew, error: self._tell(self._worker_opened, crew, error),
            died=lambda crew: self._tell(self._replace, crew, 1),
            left=lambda crew: self._tell(self._crew_left, crew),
        )
        self.crews = (self.preparation, self.inference)
        prepares = any(source.prepare for source in sources.values())
        self._needed = self.crews if prepares else (self.inference,)

    async def open(self) -> None:
        """Load and warm up every instance. Raises the first one's error, with nothing left behind."""
        self.inference.start()
        try:
            await asyncio.wait([self._opening], timeout=self._config.open_timeout)
            if not self._opening.done():
                raise EngineFailedError(
                    f"the engines did not open within {self._config.open_timeout:g} s; raise open_timeout"
                )
            self._opening.result()
            if self.preparation in self._needed:
                self.preparation.start()
                if not self.preparation.alive:
                    raise no_thread("preparation")
        except BaseException:
            self._opening.cancel()  # nobody asks for its error any more
            await self.shut()
            raise

    @property
    def instances(self) -> int:
        """How many engine workers serve, or are being opened."""
        return self.inference.alive

    @property
    def replaced(self) -> int:
        """How many workers, of both crews, were given up or died."""
        return self._replaced.total()

    @property
    def lost(self) -> bool:
        """Whether nothing is answered any more, and nothing is tried again."""
        return self.broken is not None and not self._reopens

    def contract(self, tower: str) -> TowerContract:
        """Return what a tower takes. Raises UserError for one that is not served."""
        try:
            return self.contracts[tower]
        except (KeyError, TypeError):
            if isinstance(tower, str):
                raise unknown_name("tower", tower, self.contracts) from None
            served = ", ".join(sorted(self.contracts))
            kind = type(tower).__name__
            raise UserError(f"the tower is a {kind}; give the name of one: {served}") from None

    def submit(self, request: Request) -> None:
        """Take a request that was checked and counted as held."""
        request.home = self
        self.held.add(request)
        (self.preparation if request.sample is None else self.inference).put_one(request)

    def looked_over(self, results: Results) -> Results:
        """Return results of one tower in which nobody has met NaN without failing."""
        return self.contracts[results.answered[0].tower].looked_over(results)

    def resubmit(self, requests: Sequence[Request]) -> None:
        """Queue requests once more, of which another one spoilt the batch.

        They are known to be finite and share batches with their like alone: beside newcomers, of which one in
        ten may hold NaN, hardly a batch would be without, and they would be asked again for ever.
        """
        for request in requests:
            request.bucket = ("finite", request.bucket)
        self._missing.difference_update(requests)
        self.inference.put(requests)

    def check_raw(self, tower: str) -> None:
        """Raise UserError if a tower does not exist or takes no raw input."""
        self.contract(tower)
        if self.source.towers[tower].prepare is None:
            raise UserError(f"tower {tower!r} takes arrays only; use infer")

    def forget(self, requests: Sequence[Request]) -> None:
        """Note that requests have ended, wherever they were."""
        self.held.difference_update(requests)
        if self._emptied is not None and not self.held and not self._emptied.done():
            self._emptied.set_result(None)

    def withdraw(self, request: Request) -> None:
        """Take a request out of its queue, so that its place is free at once."""
        if not self.inference.remove(request):
            self.preparation.remove(request)

    def clear(self) -> None:
        """Take out all that wait: what is to fail shall cost no engine's time."""
        for crew in self.crews:
            crew.clear()

    def look_for_hung(self, limit: float) -> int:
        """Fail the requests of calls that took longer than ``limit`` seconds; replace their workers."""
        self._mail.read()  # whatever may have kept a worker from ringing
        now = time.monotonic()
        found = 0
        for crew in self.crews:
            calls = crew.give_up_hung(now - limit, now - self._config.open_timeout)
            for request in (request for call in calls for request in call.batch):
                self._fail(request, _hung(request, limit, prepared=crew is self.inference))
            if calls:
                self._replace(crew, len(calls))
            found += len(calls)
        if self.broken is None:
            self._start_missing(now)
        self._fail_lost()
        return found

    def _fail_lost(self) -> None:
        """Fail those whom no crew has had in its hands from one look to the next.

        Whatever lost them, such as an error for want of memory on their way: nobody else would tell them.
        """
        # In the order of their way: who has left the former crew by now is in the latter, or in the mail.
        lost = self.held - self.preparation.requests() - self.inference.requests()
        for request in lost & self._missing:
            self._fail(request, _lost(request))
        self._missing = lost

    def mend(self) -> None:
        """Try again to make a worker where none is left; called for each request that is refused for it."""
        now = time.monotonic()
        if not self._reopens or now < self._next_try:
            return
        # Nothing is held, so the watchdog sleeps: the last try may hang to this day.
        for crew in self._needed:
            if stuck := crew.give_up_hung(-math.inf, now - self._config.open_timeout):
                self._replace(crew, len(stuck))
        if self._reopens:
            self._start_missing(now)

    def _start_missing(self, now: float) -> None:
        """Start workers whose replacement found no memory, say, beside one that hung; now and then."""
        if now >= self._next_try:
            self._next_try = now + self._config.hang_after
            for crew in self._needed:
                crew.start()

    async def emptied(self) -> None:
        """Answer what is held without delay, and wait until nothing is. Nothing may be submitted later."""
        for crew in self.crews:
            crew.hurry()
        if self.held:
            if self._emptied is None or self._emptied.done():
                self._emptied = self._loop.create_future()
            await asyncio.shield(self._emptied)

    async def shut(self) -> None:
        """Let the crews leave and close what they used. A worker that hangs is left behind."""
        waits = []
        for crew in self.crews:
            if crew.alive:
                waits.append(self._left.setdefault(crew.name, self._loop.create_future()))
            crew.stop()
        try:
            if waits:
                await asyncio.wait(waits, timeout=self._config.hang_after)
        finally:  # also where it is cancelled, as a second Ctrl-C does
            self._mail.close()
            self.source.close()

    def abandon(self) -> None:
        """Let the crews leave where the event loop is closed, and nobody can wait for them."""
        self.clear()
        for crew in self.crews:
            crew.stop()
        self._mail.close()
        self.source.close()

    def _replace(self, crew: Crew, count: int) -> None:
        """Make up for workers that were given up, unless there were too many in their crew.

        Each crew has its own count: inputs that are slow to prepare say nothing about the engines.
        """
        self._replaced[crew.name] += count
        now = time.monotonic()
        lately = [*(at for at in self._lately[crew.name] if at > now - _FORGIVEN_AFTER), *[now] * count]
        self._lately[crew.name] = lately
        lost = max(len(lately), crew.left_behind)
        if lost > self._config.max_replacements:
            self._reopens = False
            self._break(EngineFailedError(f"{lost} {crew.name} workers hung or died; restart the process"))
        else:
            crew.start()

    def _break(self, error: EdgeglmError) -> None:
        self.broken = error
        self.clear()
        for request in tuple(self.held):
            self._fail(request, EngineFailedError(str(error)))

    def _worker_opened(self, crew: Crew, error: BaseException | None) -> None:
        if crew is self.inference and not self._opening.done():
            self._to_open -= 1
            if error is not None:
                self._opening.set_exception(_open_failure(error))
            elif not self._to_open:
                self._opening.set_result(None)
        elif error is not None and not crew.alive:
            self._reopens = self.broken is None or self._reopens
            self._break(_open_failure(error))
        elif error is None and self._reopens and all(crew.alive for crew in self._needed):
            self.broken, self._reopens = None, False

    def _crew_left(self, crew: Crew) -> None:
        left = self._left.setdefault(crew.name, self._loop.create_future())
        if not left.done():
            left.set_result(None)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Run a function in the event loop; called by workers."""
        self._mail.post(function, *arguments)


def evicted(generations: Sequence[Generation], priority: int) -> Request | None:
    """Take out the least urgent request that waits, for an engine or for preparation, in any generation.

    None if none is less urgent than ``priority``.
    """
    waiting = [
        (worst.priority, worst.number, crew)
        for generation in generations
        for crew in generation.crews
        if (worst := crew.least_urgent())
    ]
    waiting.sort(key=lambda one: one[:2], reverse=True)
    for _, _, crew in waiting:  # the first, unless a worker has taken it meanwhile
        if victim := crew.evict(priority):
            return victim
    return None


def requests_of(generations: Sequence[Generation]) -> list[Request]:
    """Return all requests that some generations hold, the oldest first."""
    held = [request for generation in generations for request in generation.held]
    return sorted(held, key=lambda request: request.number)


def _hung(request: Request, limit: float, *, prepared: bool) -> EngineFailedError:
    what = "call" if prepared else "preparation"
    look = "" if prepared else "look at the input, or "
    return EngineFailedError(
        f"the {what} for tower {request.tower!r} did not return within {limit:.3g} s and was given up; "
        f"{look}raise hang_after if such {what}s are honest work"
    )


def _lost(request: Request) -> EngineFailedError:
    return EngineFailedError(
        f"the request for tower {request.tower!r} was lost on its way, most likely for want of memory; "
        "ask again, or leave this process more memory"
    )


def _open_failure(error: BaseException) -> EdgeglmError:
    if isinstance(error, EdgeglmError):
        return error
    failure = EngineFailedError(f"an engine cannot be opened: {told(error)}; run 'edgeglm doctor'")
    failure.__cause__ = error
    return failure
