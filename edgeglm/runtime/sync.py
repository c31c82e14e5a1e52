"""The runner for scripts and threads: the same one, in a loop of its own, behind calls that block."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.ledger import RunnerStats
from edgeglm.runtime.opening import Source
from edgeglm.runtime.requests import Array, Priority, RunnerClosedError, Sample
from edgeglm.runtime.runner import FloatRow, Runner

T = TypeVar("T")
FloatRows = npt.NDArray[np.float32]


class SyncRunner:
    """Serves the towers of a bundle to callers that block. Use it as a context manager.

    May be called from several threads; their requests then share batches. Arguments, errors and
    settings are those of ``Runner``.
    """

    def __init__(self, source: Source, config: RunnerConfig | None = None) -> None:
        self._runner = Runner(source, config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="edgeglm-loop", daemon=True)
        self._open = False
        self._pid = 0

    def __enter__(self) -> SyncRunner:
        """Load and warm up. Raises what ``Runner`` raises."""
        if self._thread.ident is not None:
            raise UserError("a runner is opened once; make another one")
        self._thread.start()
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
        """Answer what was accepted, then close."""
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
        """Return float32 [N, D], row i for text i. Raises the error of the first text that has one."""
        return self._result(_stacked([self._runner.embed_text(text) for text in texts]))

    def embed_image(
        self, image: bytes | Path, *, deadline: float | None = None, priority: int = Priority.NORMAL
    ) -> FloatRow:
        """Return float32 [D], L2-normalised, of an image file."""
        return self._result(self._runner.embed_image(image, deadline=deadline, priority=priority))

    def embed_images(self, images: Sequence[bytes | Path]) -> FloatRows:
        """Return float32 [N, D], row i for image i. Raises the error of the first image that has one."""
        return self._result(_stacked([self._runner.embed_image(image) for image in images]))

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

    def _result(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._open or os.getpid() != self._pid:
            work.close()
            if not self._open:
                raise RunnerClosedError("the runner is not open; use it in a 'with' statement")
            raise UserError("the runner was opened before a fork, its threads stayed behind; open one here")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupted caller leaves nothing behind
            raise

    def _stop(self) -> None:
        self._open = False
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


async def _stacked(rows: Sequence[Coroutine[Any, Any, FloatRow]]) -> FloatRows:
    tasks = [asyncio.ensure_future(row) for row in rows]
    try:
        return np.stack(await asyncio.gather(*tasks)) if tasks else np.zeros((0, 0), np.float32)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
