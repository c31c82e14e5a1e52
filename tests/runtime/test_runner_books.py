"""Whatever callers do, each accepted request ends exactly once and the books balance."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.requests import (
    DeadlineExceededError,
    EngineFailedError,
    OverloadedError,
    RunnerClosedError,
)
from tests.runtime.faults import (
    MISCOUNT,
    NOT_A_NUMBER,
    POISON,
    Doubler,
    doubled,
    ended,
    held,
    run,
    runner,
    towers,
)

ENDS = (DeadlineExceededError, EngineFailedError, OverloadedError, RunnerClosedError, UserError)
BAD = (POISON, MISCOUNT, NOT_A_NUMBER, float("nan"))

asks = st.tuples(
    st.just("ask"),
    st.sampled_from([1.0, 2.0, 3.0, 4.0, *BAD]),
    st.sampled_from([None, None, 10.0, 0.001, 0.0]),
    st.integers(0, 2),
)
steps = st.lists(
    st.one_of(
        asks,
        asks,
        st.tuples(st.just("cancel"), st.integers(0, 40)),
        st.tuples(st.just("turn"), st.integers(1, 5)),
        st.tuples(st.just("sleep")),
        st.tuples(st.just("swap")),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=25, deadline=None)
@given(
    steps,
    st.integers(1, 5),
    st.sampled_from([1, 3, 64]),
    st.sampled_from(["wait", "shed"]),
    st.integers(1, 2),
)
def test_every_request_ends_once_whatever_happens(
    script: Sequence[tuple[Any, ...]], most: int, capacity: int, when_full: str, instances: int
):
    doublers = [Doubler()]
    values: list[float] = []
    tasks: list[asyncio.Task[float]] = []

    async def main() -> None:
        policy = BatchPolicy(max_batch_size=most, max_queue_delay_microseconds=200)
        served = runner(
            doublers[0], batching=policy, capacity=capacity, when_full=when_full, instances=instances
        )
        async with served:
            for step in script:
                if step[0] == "ask":
                    values.append(step[1])
                    work = doubled(served, step[1], deadline=step[2], priority=step[3])
                    tasks.append(asyncio.create_task(work))
                elif step[0] == "cancel" and tasks:
                    tasks[step[1] % len(tasks)].cancel()
                elif step[0] == "turn":
                    for _ in range(step[1]):
                        await asyncio.sleep(0)
                elif step[0] == "sleep":
                    await asyncio.sleep(0.001)
                elif step[0] == "swap":
                    doublers.append(Doubler())
                    await served.swap(towers(doublers[-1]))
        answers = await ended(*tasks)
        stats = served.stats()
        assert stats.held == stats.waiting == 0
        kinds: Counter[str] = Counter()
        for value, answer in zip(values, answers, strict=True):
            if isinstance(answer, float):
                assert value not in BAD
                assert answer == 2 * value
                kinds["answered"] += 1
            else:
                assert isinstance(answer, (*ENDS, asyncio.CancelledError)), answer
        assert kinds["answered"] <= stats.answered  # one may be cancelled with its answer at hand
        ends = stats.answered + stats.failed + stats.cancelled + stats.expired + stats.shed
        assert stats.accepted + stats.turned_away == ends <= len(tasks)

    run(main)
    assert not any(engine.loaded for doubler in doublers for engine in doubler.made)


def test_the_books_balance_in_the_moment_in_which_a_place_passes_on():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, capacity=1) as served:
            first = await held(doubler, served, 1.0)
            second, third = (asyncio.create_task(doubled(served, value)) for value in (2.0, 3.0))
            await asyncio.sleep(0)
            first.cancel()
            for turn in range(6):
                if turn == 2:
                    second.cancel()
                await asyncio.sleep(0)
                stats = served.stats()
                ends = (stats.answered, stats.failed, stats.expired, stats.cancelled, stats.shed, stats.held)
                assert stats.accepted + stats.turned_away == sum(ends), (turn, stats)
            doubler.gate.set()
            assert await third == 6.0
            await ended(first, second)

    run(main)
