"""The answers of one stream in the order of its requests, and how a stream ends that is left open.

A stream takes a place of the server for as long as it lasts. One that says nothing, or that nobody reads, is
therefore ended, and so is any when the server stops: else its caller alone would say when.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

from edgeglm.runtime.requests import RunnerClosedError
from edgeglm.serve.refusals import SlowCallerError

_AT_ONCE = 32  # requests of one stream that are worked on together

Answering = Callable[[Any], Coroutine[Any, Any, Any]]


async def answers_in_order(
    requests: AsyncIterator[Any],
    answer: Answering,
    *,
    stopping: asyncio.Event,
    silent_for: float,
    unread_for: float,
) -> AsyncGenerator[Any, None]:
    """Answer what comes, until it ends. Runs in a task of its own, which is cancelled if nobody reads.

    Args:
        requests: What comes.
        answer: Answers one; raises nothing.
        stopping: Set when the server stops: what had come by then is answered.
        silent_for: Seconds that a stream with nothing under way may say nothing.
        unread_for: Seconds that an answer may wait for its reader.

    Raises:
        SlowCallerError: The stream was silent for too long.
        RunnerClosedError: The server stops.
    """
    waiting: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(maxsize=_AT_ONCE)

    async def take() -> None:
        async for request in requests:
            if stopping.is_set():
                return
            await waiting.put(asyncio.ensure_future(answer(request)))
        await waiting.put(None)

    taking, stop = asyncio.ensure_future(take()), asyncio.ensure_future(stopping.wait())
    reader = asyncio.current_task()
    assert reader is not None
    loop = asyncio.get_running_loop()
    try:
        while True:
            task = await _next(waiting, taking, stop, silent_for)
            if task is None:
                return
            answered = await task
            unread = loop.call_later(unread_for, reader.cancel)
            try:
                yield answered
            finally:
                unread.cancel()
    finally:
        taking.cancel()
        stop.cancel()
        while not waiting.empty():
            left = waiting.get_nowait()
            if left is not None:
                left.cancel()


async def _next(
    waiting: asyncio.Queue[asyncio.Task[Any] | None],
    taking: asyncio.Future[None],
    stop: asyncio.Future[Any],
    silent_for: float,
) -> asyncio.Task[Any] | None:
    """Return the next request's task, None at the end of the stream. Raises what ends the stream."""
    if not waiting.empty():
        return waiting.get_nowait()
    coming = asyncio.ensure_future(waiting.get())
    try:
        events: list[asyncio.Future[Any]] = [coming, taking, stop]
        await asyncio.wait(events, timeout=silent_for, return_when=asyncio.FIRST_COMPLETED)
        if coming.done() or not waiting.empty():
            return await coming
        if taking.done() and taking.exception() is not None:
            taking.result()
        if stop.done():
            raise RunnerClosedError("the server stops; ask another, or this one again in a while")
        if not taking.done():
            raise SlowCallerError(f"nothing came over this stream for {silent_for:g} s; open it again to ask")
        return await coming
    finally:
        coming.cancel()
