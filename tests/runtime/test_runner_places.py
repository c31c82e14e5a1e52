"""What callers would lose in a queue: their time, their place, their answer when a runner closes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.requests import (
    DeadlineExceededError,
    OverloadedError,
    Priority,
    RunnerClosedError,
)
from edgeglm.runtime.runner import Runner
from tests.runtime.faults import (
    HANG,
    LIMIT,
    Doubler,
    doubled,
    ended,
    held,
    run,
    runner,
    sample,
    towers,
    until,
)


def test_a_deadline_ends_a_request_that_waits_and_the_engine_never_sees_it():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            first = await held(doubler, served, 1)
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError, match=r"no answer within 0.05 s; allow more time"):
                await doubled(served, 2, deadline=0.05)
            assert time.monotonic() - started < 2
            assert served.stats().held == 1
            doubler.gate.set()
            assert await first == 2.0
            assert served.stats().expired == 1
        assert doubler.batches == [[1.0]]

    run(main)


def test_a_deadline_ends_a_request_whose_call_is_slow():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            doubler.gate.clear()
            with pytest.raises(TimeoutError):
                await doubled(served, 1, deadline=0.05)
            doubler.gate.set()
            assert await doubled(served, 2, deadline=5) == 4.0

    run(main)


def test_time_spent_waiting_for_a_place_counts_towards_the_deadline():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, capacity=1) as served:
            first = await held(doubler, served, 1)
            started = time.monotonic()
            second = asyncio.create_task(doubled(served, 2, deadline=0.6))
            await asyncio.sleep(0.4)
            first.cancel()  # the second gets the place, and the engine is still busy
            with pytest.raises(DeadlineExceededError):
                await second
            assert time.monotonic() - started < 0.98
            doubler.gate.set()

    run(main)


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("-inf")])
def test_a_deadline_in_the_past_never_reaches_the_queue(deadline):
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            with pytest.raises(DeadlineExceededError):
                await doubled(served, 1, deadline=deadline)
        assert not doubler.batches

    run(main)


def test_cancellation_frees_the_place_at_once():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, capacity=2) as served:
            running = await held(doubler, served, 1)
            waiting = asyncio.create_task(doubled(served, 2))
            third = asyncio.create_task(doubled(served, 3))
            await asyncio.sleep(0)
            assert served.stats().accepted == 2
            waiting.cancel()
            await ended(waiting)
            await asyncio.sleep(0)
            assert served.stats().accepted == 3
            doubler.gate.set()
            assert [await running, await third] == [2.0, 6.0]
        assert doubler.batches == [[1.0], [3.0]]

    run(main)


def test_cancelling_one_of_a_running_batch_leaves_the_others_their_answers():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            doubler.gate.clear()
            tasks = [asyncio.create_task(doubled(served, value)) for value in range(4)]
            await until(doubler.entered.is_set)
            tasks[1].cancel()
            await asyncio.sleep(0)
            doubler.gate.set()
            answers = await ended(*tasks)
            assert isinstance(answers[1], asyncio.CancelledError)
            assert [answers[0], *answers[2:]] == [0.0, 4.0, 6.0]
            assert served.stats().held == 0

    run(main)


def test_a_full_runner_makes_callers_wait_and_serves_the_urgent_first():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, capacity=1) as served:
            tasks = [await held(doubler, served, 0)]
            tasks.append(asyncio.create_task(doubled(served, 1, priority=Priority.LOW)))
            tasks.append(asyncio.create_task(doubled(served, 2, priority=Priority.HIGH)))
            late = asyncio.create_task(doubled(served, 3, deadline=0.05))
            with pytest.raises(DeadlineExceededError):
                await late
            doubler.gate.set()
            assert await asyncio.gather(*tasks) == [0.0, 2.0, 4.0]
        assert doubler.batches == [[0.0], [2.0], [1.0]]

    run(main)


def test_a_runner_that_sheds_refuses_the_newest_or_the_least_urgent():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, capacity=2, when_full="shed") as served:
            running = await held(doubler, served, 1)
            low = asyncio.create_task(doubled(served, 2, priority=Priority.LOW))
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError, match="holds 2 requests already; try later"):
                await doubled(served, 3, priority=Priority.LOW)
            urgent = asyncio.create_task(doubled(served, 4, priority=Priority.HIGH))
            with pytest.raises(OverloadedError):
                await low
            doubler.gate.set()
            assert [await running, await urgent] == [2.0, 8.0]
            assert served.stats().shed == 2

    run(main)


def test_a_full_runner_sheds_what_waits_for_a_former_bundle_too():
    old, new = Doubler(), Doubler()

    async def main() -> None:
        async with runner(old, capacity=2, when_full="shed") as served:
            running = await held(old, served, 1)
            low = asyncio.create_task(doubled(served, 2, priority=Priority.LOW))
            await asyncio.sleep(0)
            switched = asyncio.Event()
            swapping = asyncio.create_task(served.swap(towers(new), switched=switched.set))
            await switched.wait()
            assert await doubled(served, 3, priority=Priority.HIGH) == 6.0
            with pytest.raises(OverloadedError, match="holds 2 requests already"):
                await low
            old.gate.set()
            assert await running == 2.0
            await swapping
            assert old.batches == [[1.0]]

    run(main)


def test_a_request_in_preparation_goes_before_a_more_urgent_one_that_waits_for_an_engine():
    doubler, prepare, release = Doubler(), threading.Event(), threading.Event()

    def held_back(inputs: Sequence[object]) -> list[dict[str, np.ndarray]]:
        prepare.set()
        assert release.wait(LIMIT)
        return [sample(3.0) for _ in inputs]

    async def main() -> None:
        source = {"double": TowerSource(engine=doubler, prepare=held_back)}
        config = RunnerConfig(warm_up=False, preparation_threads=1, capacity=4, when_full="shed")
        async with Runner(source, config) as served:

            def raw(priority: int) -> asyncio.Task[object]:
                asked = served._answer("double", raw="x", deadline=None, priority=priority)
                return asyncio.create_task(asked)

            doubler.gate.clear()
            running, preparing = asyncio.create_task(doubled(served, 1)), raw(Priority.LOW)
            await until(lambda: doubler.entered.is_set() and prepare.is_set())
            normal, low = asyncio.create_task(doubled(served, 2)), raw(Priority.LOW)
            await asyncio.sleep(0)
            urgent = asyncio.create_task(doubled(served, 4, priority=Priority.HIGH))
            with pytest.raises(OverloadedError):
                await low
            release.set()
            doubler.gate.set()
            assert [await running, await normal, await urgent] == [2.0, 4.0, 8.0]
            await preparing

    run(main)


def test_whoever_waits_for_a_place_leaves_the_line_at_the_deadline_though_others_are_before_him():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, capacity=1) as served:
            running = await held(doubler, served, 1)
            first = asyncio.create_task(doubled(served, 2))
            await asyncio.sleep(0)
            late = [asyncio.create_task(doubled(served, 3, deadline=0.01)) for _ in range(50)]
            for answer in await ended(*late):
                assert isinstance(answer, DeadlineExceededError)
            assert [len(waiters) for waiters in served._admission._line.values()] == [1]
            doubler.gate.set()
            assert [await running, await first] == [2.0, 4.0]
            assert not served._admission._line

    run(main)


def test_close_answers_what_was_accepted_and_refuses_the_rest():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, capacity=3) as served:
            doubler.gate.clear()
            tasks = [asyncio.create_task(doubled(served, value)) for value in range(3)]
            await until(doubler.entered.is_set)
            without_place = asyncio.create_task(doubled(served, 9))
            await asyncio.sleep(0)
            closing = asyncio.create_task(served.close())
            with pytest.raises(RunnerClosedError):
                await without_place
            with pytest.raises(RunnerClosedError, match="open another one"):
                await doubled(served, 10)
            doubler.gate.set()
            await closing
            assert await asyncio.gather(*tasks) == [0.0, 2.0, 4.0]
            await served.close()

    run(main)


def test_close_gives_up_on_requests_that_never_end():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, drain_timeout=0.05, hang_after=0.3) as served:
            stuck = asyncio.create_task(doubled(served, HANG))
            await until(doubler.entered.is_set)
        with pytest.raises(RunnerClosedError):
            await stuck
        doubler.released.set()

    run(main)


def test_no_engine_works_on_for_callers_that_a_close_gave_up():
    doubler = Doubler()

    async def main() -> None:
        one_by_one = BatchPolicy(max_batch_size=1)
        async with runner(doubler, drain_timeout=0.05, batching=one_by_one) as served:
            stuck = await held(doubler, served, 1)
            waiting = [asyncio.create_task(doubled(served, value)) for value in range(20)]
            await asyncio.sleep(0)
            closing = asyncio.create_task(served.close())
            for answer in await ended(stuck, *waiting):
                assert isinstance(answer, RunnerClosedError)
            doubler.gate.set()
            await closing
        assert doubler.batches == [[1.0]]
        assert not doubler.made[0].loaded

    run(main)


def test_a_full_runner_does_not_wait_for_company_that_it_cannot_hold():
    doubler = Doubler()

    async def main() -> None:
        policy = BatchPolicy(
            max_batch_size=8, preferred_batch_sizes=(8,), max_queue_delay_microseconds=60_000_000
        )
        async with runner(doubler, capacity=2, batching=policy, warm_up=True) as served:
            assert sorted(map(len, doubler.batches)) == [1, 2]
            assert await ended(*(doubled(served, value) for value in (1, 2, 3, 4))) == [2, 4, 6, 8]
            assert served.stats().batches == {"double": {2: 2}}

    run(main)
