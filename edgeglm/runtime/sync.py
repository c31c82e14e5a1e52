"""The runner for scripts and threads: the same one, in a loop of its own, behind calls that block."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.ledger import RunnerStats
from edgeglm.runtime.opening import Source
from edgeglm.runtime.requests import Array, Priority, RunnerClosedError, Sample, no_thread
from edgeglm.runtime.runner import FloatRow, Runner

T = TypeVar("T")
Raw = TypeVar("Raw")
FloatRows = npt.NDArray[np.float32]

_TRIES = 5  # to embed a list with one bundle


class SyncRunner:
    """Serves the towers of a bundle to callers that block. Use it as a context manager.

    May be called from several threads; their requests then share batches. Arguments, errors and
    settings are those of ``Runner``.
    """

    def __init__(self, source: Source, config: RunnerConfig | None = None) -> None:
        self._runner = Runner(source, config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # nobody may come between the last call and the end of the loop
        self._leaving = threading.RLock()  # two that stop one loop would wait for it for ever
        self._open = False
        self._pid = 0

    def __enter__(self) -> SyncRunner:
        """Load and warm up. Raises what ``Runner`` raises."""
        if self._thread is not None:
            raise UserError("a runner is opened once; make another one")
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_live, args=(loop,), name="edgeglm-loop", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            loop.close()
            raise no_thread("the event loop of a runner", error) from error
        self._loop, self._thread = loop, thread
        self._open, self._pid = True, os.getpid()
        try:
            self._result(self._runner.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Answer what was accepted, then close. Does nothing a second time, and in a forked child.

        Where several threads leave at once, all wait for the end.
        """
        if os.getpid() != self._pid:  # never entered, or a child: its threads are the parent's
            self._open = False
            return
        with self._leaving:
            if self._open:
                try:
                    self._result(self._runner.close())
                finally:
                    self._stop()

    def embed_text(
        self, text: str, *, deadline: float | None = None, priority: int = Priority.NORMAL
    ) -> FloatRow:
        """Return float32 [D], L2-normalised."""
        return self._result(self._runner.embed_text(text, deadline=deadline, priority=priority))

    def embed_texts(self, texts: Sequence[str]) -> FloatRows:
        """Return float32 [N, D], row i for text i. Raises the error of the first text that has one.

        At most as many as the runner holds are asked at a time, so a list may be longer than ``capacity``.
        All rows are of one bundle: those of a list that meets a swap are asked for again.
        """
        return self._result(self._stacked("text", self._runner.embed_text, _listed(texts, "text")))

    def embed_image(
        self, image: bytes | Path, *, deadline: float | None = None, priority: int = Priority.NORMAL
    ) -> FloatRow:
        """Return float32 [D], L2-normalised, of an image file."""
        return self._result(self._runner.embed_image(image, deadline=deadline, priority=priority))

    def embed_images(self, images: Sequence[bytes | Path]) -> FloatRows:
        """Return float32 [N, D], row i for image i. Raises the error of the first image that has one.

        At most as many as the runner holds are asked at a time, so a list may be longer than ``capacity``.
        """
        return self._result(self._stacked("image", self._runner.embed_image, _listed(images, "image")))

    def infer(
        self, tower: str, sample: Sample, *, deadline: float | None = None, priority: int = Priority.NORMAL
    ) -> dict[str, Array]:
        """Run one sample without batch axis and return its outputs likewise."""
        return self._result(self._runner.infer(tower, sample, deadline=deadline, priority=priority))

    def swap(self, source: Source) -> None:
        """Serve another bundle from now on."""
        self._result(self._runner.swap(source))

    def stats(self) -> RunnerStats:
        """Say what was done so far."""

        async def stats() -> RunnerStats:
            return self._runner.stats()

        return self._result(stats())

    async def _stacked(
        self, tower: str, embed: Callable[[Raw], Coroutine[Any, Any, FloatRow]], inputs: Sequence[Raw]
    ) -> FloatRows:
        """Embed all with one set of towers: vectors of two spaces in one array would be compared."""
        if not inputs:
            return np.zeros((0, self._width(tower)), np.float32)
        for _ in range(_TRIES):
            swaps = self._runner.swaps
            rows = await self._rows(embed, inputs)
            if self._runner.swaps == swaps:
                return np.stack(rows)
        raise UserError(
            f"the bundle was swapped during each of {_TRIES} tries to embed {len(inputs)} inputs with one; "
            "give fewer at a time, or swap less often"
        )

    async def _rows(
        self, embed: Callable[[Raw], Coroutine[Any, Any, FloatRow]], inputs: Sequence[Raw]
    ) -> list[FloatRow]:
        """Embed all, or the first of them where another set of towers takes over meanwhile."""
        swaps = self._runner.swaps
        rows: dict[int, FloatRow] = {}
        errors: dict[int, Exception] = {}
        turns = iter(range(len(inputs)))

        async def some() -> None:
            for turn in turns:
                try:
                    rows[turn] = await embed(inputs[turn])
                except Exception as error:  # those before it are under way, and may have one too
                    errors[turn] = error
                if errors or self._runner.swaps != swaps:
                    return

        at_once = min(self._runner.config.capacity, len(inputs))
        await asyncio.gather(*(some() for _ in range(at_once)))
        if errors:
            raise errors[min(errors)]
        return [rows[turn] for turn in sorted(rows)]

    def _width(self, tower: str) -> int:
        """Return how long an embedding is; 0 where the model does not declare it."""
        contract = self._runner.contracts.get(tower)
        specs = contract.outputs if contract is not None else ()
        sizes = [spec.shape[-1] for spec in specs if spec.name == "embedding" and spec.shape]
        return sizes[0] if sizes and isinstance(sizes[0], int) else 0

    def _result(self, work: Coroutine[Any, Any, T]) -> T:
        if self._open and os.getpid() != self._pid:
            work.close()
            raise UserError("the runner was opened before a fork, its threads stayed behind; open one here")
        with self._lock:
            if not self._open or self._loop is None:
                work.close()
                raise RunnerClosedError("the runner is not open; use it in a 'with' statement")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RunnerClosedError("the runner was closed before an answer; open another one") from None
        except BaseException:
            future.cancel()  # an interrupted caller leaves nothing behind
            raise

    def _stop(self) -> None:
        with self._lock:
            was, self._open = self._open, False
        if was and self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._runner.abandon()  # what an interrupted close has left


def _listed(inputs: Sequence[Raw], what: str) -> list[Raw]:
    """Return inputs as a list. Raises UserError for a single one: the letters of a text are texts, too."""
    if isinstance(inputs, (str, bytes, bytearray, memoryview, Path)):
        raise UserError(f"embed_{what}s got a single {what}; put it in a list, or use embed_{what}")
    given: object = inputs  # whatever a caller without types may give
    if not isinstance(given, Iterable):
        raise UserError(f"embed_{what}s got a {type(given).__name__}; give a list of {what}s")
    return list(inputs)


def _live(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop in this thread until it is stopped, then end what is left in it and close it."""
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        with contextlib.suppress(RuntimeError):  # it takes a thread, and there may be none
            loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
