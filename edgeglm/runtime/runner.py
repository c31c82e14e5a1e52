"""The asynchronous runner: many callers, few engines, and an answer for everyone.

    async with Runner(Path("fruit.bundle")) as runner:
        vector = await runner.embed_text("a red apple", deadline=0.05)

A request passes through two crews of threads: one tokenises or decodes, one runs engines. Each hop
carries a batch. The event loop keeps the books: it alone admits requests and ends them, each exactly
once, with a result, an error, or at its deadline.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError
from edgeglm.runtime.admission import Admission
from edgeglm.runtime.closing import Signals
from edgeglm.runtime.config import RunnerConfig, is_number
from edgeglm.runtime.contract import TowerContract
from edgeglm.runtime.ends import Ends, embedding, overloaded
from edgeglm.runtime.generation import Generation, evicted, requests_of
from edgeglm.runtime.ledger import Ledger, RunnerStats
from edgeglm.runtime.opening import Source, opened_source
from edgeglm.runtime.plain import plain
from edgeglm.runtime.requests import (
    Array,
    DeadlineExceededError,
    EngineFailedError,
    Priority,
    Request,
    RunnerClosedError,
    Sample,
    late_text,
)
from edgeglm.runtime.residence import Residence
from edgeglm.runtime.times import StageTimes

FloatRow = npt.NDArray[np.float32]


class Runner:
    """Serves the towers of a bundle. Use it as an asynchronous context manager, in one event loop.

    Args:
        source: A bundle's path, which is verified first; an opened bundle, which stays the caller's;
            or towers by name.
        config: How it behaves.
    """

    def __init__(self, source: Source, config: RunnerConfig | None = None) -> None:
        self.config = config or RunnerConfig()
        self._source = source
        self._admission = Admission(self.config.capacity)
        self._state = "new"
        self._current: Generation | None = None
        self._generations: list[Generation] = []
        self._ledger = Ledger()
        self._ends = Ends(self._admission, self._ledger)
        self._watchdog: asyncio.TimerHandle | None = None
        self._look_at = self._stood_still = self._heeded_until = 0.0  # of the watchdog
        self._tasks: set[asyncio.Task[None]] = set()
        self._signals = Signals()
        self._home: Residence | None = None
        self.swaps = 0  # how often other towers took over

    async def __aenter__(self) -> Runner:
        """Load and warm up. Raises UserError for a bundle or an engine that cannot be used."""
        if self._state != "new":
            raise UserError("a runner is opened once; make another one")
        self._home = Residence()
        self._state = "opening"
        try:
            self._current = await self._opened(self._source)
        except BaseException:
            self._state = "closed"
            raise
        self._state = "open"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Answer what was accepted, then close; at once if cancelled meanwhile: nobody else will close it."""
        try:
            await self.close()
        except asyncio.CancelledError:
            self._refuse_held()
            self.abandon()
            raise

    async def embed_text(
        self, text: str, *, deadline: float | None = None, priority: int = Priority.NORMAL
    ) -> FloatRow:
        """Return float32 [D], L2-normalised. Arguments and errors are those of ``infer``.

        A text that is too long loses its end, as in training. Raises UserError for an empty one.
        """
        outputs = await self._answer("text", raw=text, deadline=deadline, priority=priority)
        return embedding("text", outputs)

    async def embed_image(
        self, image: bytes | Path, *, deadline: float | None = None, priority: int = Priority.NORMAL
    ) -> FloatRow:
        """Return float32 [D], L2-normalised, of an image file. Arguments and errors are those of ``infer``.

        Raises UserError for a file that is damaged, missing or too large to decode.
        """
        outputs = await self._answer("image", raw=image, deadline=deadline, priority=priority)
        return embedding("image", outputs)

    def infer(
        self,
        tower: str,
        sample: Sample,
        *,
        deadline: float | None = None,
        priority: int = Priority.NORMAL,
    ) -> Coroutine[Any, Any, dict[str, Array]]:
        """Run one sample, ``{input: array without the batch axis}``, and return its outputs likewise.

        To be awaited, as ``async`` methods are.

        Args:
            tower: Which one.
            sample: What it takes. Leave the arrays alone until the answer is there.
            deadline: Seconds from now after which no answer is wanted.
            priority: The smaller, the sooner.

        Raises:
            UserError: Unknown tower; a name, shape or dtype that does not fit; NaN or infinity; a deadline
                or priority that is no number.
            DeadlineExceededError: No answer in time. The engine does not see it if it had not begun.
            OverloadedError: The runner is full, and sheds.
            EngineFailedError: The engine raised, hung or answered nonsense for this request.
            RunnerClosedError: The runner is closed, or was before an answer was there.
        """
        return self._answer(tower, sample=sample, deadline=deadline, priority=priority)

    async def swap(self, source: Source, *, switched: Callable[[], None] | None = None) -> None:
        """Serve another bundle from now on. Returns once the former one has answered all it held.

        Both are in memory for a while. If the new one cannot be opened the runner goes on with the old
        one and the error is raised. ``switched`` is called in the moment from which new requests go to
        the new one.
        """
        self._usable()
        fresh = await self._opened(source)
        former, self._current = self._current, fresh
        self.swaps += 1
        assert former is not None
        retiring = self._spawn(self._retire(former))
        if switched is not None:
            switched()
        await asyncio.shield(retiring)

    async def close(self) -> None:
        """Refuse what is new, answer what was accepted, and give everything back.

        What is not answered within ``drain_timeout`` ends with RunnerClosedError. May be called again, also
        after it was cancelled, and from anywhere once the runner's own loop is closed.
        """
        home = self._home
        if home is None or home.forked:
            self._state = "closed"  # in a forked child there is nothing to close
        if home is None or self._state == "closed":
            return
        if home.loop.is_closed():
            self.abandon()
            return
        home.check("close it in that loop")
        self._state = "closing"
        self._admission.refuse(lambda: RunnerClosedError("the runner is being closed; open another one"))
        waits = [asyncio.ensure_future(g.emptied()) for g in self._generations if g.held]
        if waits:
            try:
                await asyncio.wait(waits, timeout=self.config.drain_timeout)
            finally:
                for wait in waits:
                    wait.cancel()
        self._refuse_held()
        await self._shut()

    def abandon(self) -> None:
        """Give everything back, and wait for nothing: where the loop has ended, or nobody waits for answers.

        Does nothing to a runner that was closed.
        """
        if self._state == "closed":
            return
        for generation in self._generations:
            generation.abandon()
            self._ledger.retire(generation)  # what it did stays in the books
        self._generations.clear()
        if self._home is not None:
            self._signals.off(self._home.loop)
        self._state = "closed"

    def close_on(self, *signals: signal.Signals) -> None:
        """Close when the process receives one of the signals, such as SIGTERM.

        Requests that were accepted are answered; later ones raise RunnerClosedError, which ends the callers.
        A closed runner puts the former handlers back. Raises UserError where an event loop cannot watch for
        signals: outside the main thread, or on Windows.
        """
        _, loop = self._usable()
        for number in signals:
            self._signals.on(loop, number, lambda: self._spawn(self.close()))

    @property
    def serving(self) -> tuple[str, str]:
        """The variant that is served, and through what, in words; empty for towers given by name."""
        generation, _ = self._usable()
        return generation.source.variant, generation.source.words

    @property
    def contracts(self) -> Mapping[str, TowerContract]:
        """What each tower takes and gives now, by name."""
        return self._usable()[0].contracts

    @property
    def broken(self) -> str:
        """Why no request is answered; empty where they are. To ask has a lost engine tried again."""
        generation = self._current
        if generation is None or generation.broken is None:
            return ""
        generation.mend()
        return str(generation.broken)

    @property
    def lost(self) -> str:
        """Why only another process, or another bundle, will answer again; empty where requests may be yet."""
        generation = self._current
        return str(generation.broken) if generation is not None and generation.lost else ""

    @property
    def closing(self) -> bool:
        """Whether it takes no more requests: it is being closed, or is closed."""
        return self._state in ("closing", "closed")

    def stats(self) -> RunnerStats:
        """Say what was done so far. Raises UserError in a forked child."""
        if self._home is not None:
            self._home.check_process()
        return self._ledger.stats(self._generations, self._admission.held - self._admission.promised)

    def times(self) -> StageTimes:
        """Say how long the calls of each stage took, and their oldest requests had waited: (stage, tower).

        Raises UserError in a forked child.
        """
        if self._home is not None:
            self._home.check_process()
        return self._ledger.times(self._generations)

    async def _answer(
        self,
        tower: str,
        *,
        raw: object = None,
        sample: Sample | None = None,
        deadline: float | None,
        priority: int,
    ) -> dict[str, Array]:
        generation, loop = self._usable()
        if not isinstance(priority, int) and not isinstance(priority := plain(priority), int):
            raise UserError(f"the priority is {priority!r}; give a whole number, such as Priority.HIGH")
        if deadline is not None and not is_number(deadline) and not is_number(deadline := plain(deadline)):
            raise UserError(f"the deadline is {deadline!r}; give seconds from now, or None")
        now = time.monotonic()
        try:
            until = None if deadline is None else now + deadline
        except OverflowError:
            raise UserError("the deadline is beyond all numbers; give seconds from now, or None") from None
        request = Request(tower, raw, sample, priority, now, until)
        self._check(request, generation)
        if deadline is not None and not deadline > 0:
            if deadline != deadline:
                raise UserError("the deadline is nan; give seconds from now, or None")
            self._ends.turn_away("expired")
            raise DeadlineExceededError(late_text(request, now))
        if not self._admission.admit():
            await self._wait_for_place(request)
            try:
                generation, loop = self._usable()
                self._check(request, generation)  # another bundle may be served by now
            except BaseException:
                self._admission.release()
                raise
        request.home = generation
        try:
            self._ledger.accepted += 1
            future = request.future = loop.create_future()
            generation.submit(request)
            if request.deadline is not None:
                left = request.deadline - time.monotonic()  # it may have waited for its place
                request.timer = loop.call_later(max(left, 0.0), self._ends.expire, request)
            if self._watchdog is None:
                self._watch(loop)
            outputs: dict[str, Array] = await future
            return outputs
        except (Exception, asyncio.CancelledError):  # nobody is to keep a place for nobody
            self._ends.cancel(request)
            raise

    def _check(self, request: Request, generation: Generation) -> None:
        if generation.broken is not None:
            generation.mend()
            raise EngineFailedError(str(generation.broken))  # a new one: each caller adds its traceback
        if request.sample is not None:
            generation.contract(request.tower).place(request)
        elif request.raw is not None:
            generation.check_raw(request.tower)
        else:
            generation.contract(request.tower)
            raise UserError(
                f"tower {request.tower!r} got None; give a text, an image, or {{input name: array}} to infer"
            )

    async def _wait_for_place(self, request: Request) -> None:
        """Get a place in a full runner, in the user's chosen way."""
        if self.config.when_full == "shed":
            victim = evicted(self._generations, request.priority)
            if victim is not None:
                self._ends.fail(victim, overloaded(self.config.capacity), count="shed")
            if victim is None or not self._admission.admit():
                self._ends.turn_away("shed")
                raise overloaded(self.config.capacity)
            return
        try:
            await self._admission.place(request.priority, request.deadline)
        except TimeoutError:
            self._ends.turn_away("expired")
            raise DeadlineExceededError(late_text(request, time.monotonic())) from None

    def _usable(self) -> tuple[Generation, asyncio.AbstractEventLoop]:
        """Return what serves now. Raises where an answer could never come."""
        generation, home = self._current, self._home
        if self._state != "open" or generation is None or home is None:
            if self._state in ("new", "opening"):
                raise UserError("the runner is not open; use it in an 'async with' statement")
            raise RunnerClosedError("the runner is closed; open another one")
        home.check()
        return generation, home.loop

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._look_at = time.monotonic() + self.config.hang_after / 4
        self._watchdog = loop.call_later(self.config.hang_after / 4, self._look_for_hung)

    def _look_for_hung(self) -> None:
        self._watchdog = None
        assert self._home is not None
        try:
            limit, now = self.config.hang_after, time.monotonic()
            if now - self._look_at > limit / 4:  # a paused container, SIGSTOP: calls most likely stood still
                self._stood_still, self._heeded_until = now - self._look_at, now + limit
            if now < self._heeded_until:
                limit += self._stood_still
            for generation in self._generations:
                generation.look_for_hung(limit)
        finally:  # too little memory for one look must not be the last
            if any(generation.held for generation in self._generations):
                self._watch(self._home.loop)

    async def _opened(self, source: Source) -> Generation:
        """Open a source and its engines, or leave nothing behind: also where it is closed meanwhile."""
        state = self._state
        opened = await opened_source(source, self.config)
        try:
            self.config.check_towers(opened.towers)
        except BaseException:
            opened.close()
            raise
        generation = Generation(opened, self.config, deliver=self._ends.deliver, fail=self._ends.fail)
        await generation.open()
        if self._state != state:
            await generation.shut()
            raise RunnerClosedError("the runner was closed while it loaded; open another one")
        self._generations.append(generation)
        return generation

    async def _retire(self, generation: Generation) -> None:
        await generation.emptied()
        await generation.shut()
        if generation in self._generations:
            self._ledger.retire(generation)
            self._generations.remove(generation)

    def _refuse_held(self) -> None:
        for generation in self._generations:
            generation.clear()
        for request in requests_of(self._generations):
            self._ends.fail(
                request, RunnerClosedError("the runner was closed before an answer; open another one")
            )

    async def _shut(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._home is not None:
            self._signals.off(self._home.loop)
        for generation in tuple(self._generations):
            await generation.shut()
        self._state = "closed"

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that nobody may lose."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
