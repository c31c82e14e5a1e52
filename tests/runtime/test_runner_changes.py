"""What callers would lose when a runner opens, changes its towers or runs several instances."""

from __future__ import annotations

import asyncio

import pytest

from edgeglm.core.errors import UserError
from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.requests import (
    EngineFailedError,
    RunnerClosedError,
)
from tests.runtime.faults import (
    Doubler,
    doubled,
    run,
    runner,
    towers,
    until,
)


def test_an_exception_in_the_callers_block_leaves_no_engine_open():
    doubler = Doubler()

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            async with runner(doubler, instances=2):
                raise ZeroDivisionError
        assert [engine.loaded for engine in doubler.made] == [False, False]

    run(main)


def test_several_instances_work_at_the_same_time():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, instances=3, batching=BatchPolicy(max_batch_size=1)) as served:
            doubler.gate.clear()
            tasks = [asyncio.create_task(doubled(served, value)) for value in range(6)]
            await until(lambda: len(doubler.batches) == 3)
            doubler.gate.set()
            assert await asyncio.gather(*tasks) == [2.0 * value for value in range(6)]

    run(main)


def test_a_swap_under_load_loses_nothing_and_later_requests_see_the_new_towers():
    old, new = Doubler(), Doubler(factor=3.0)

    async def main() -> None:
        async with runner(old) as served:
            answers: list[float] = []

            async def client() -> None:
                for _ in range(60):
                    answers.append(await doubled(served, 1))

            clients = [asyncio.create_task(client()) for _ in range(8)]
            await asyncio.sleep(0.005)
            await served.swap(towers(new))
            assert not any(engine.loaded for engine in old.made)
            assert await doubled(served, 1) == 3.0
            await asyncio.gather(*clients)
            assert len(answers) == 480
            assert set(answers) <= {2.0, 3.0}
            stats = served.stats()
            assert stats.answered == stats.accepted == 481
            assert sum(size * calls for size, calls in stats.batches["double"].items()) == 481

    run(main)


def test_a_swap_to_something_broken_leaves_the_old_towers_in_service():
    old, new = Doubler(), Doubler()
    new.load_error = UserError("no such file; give another")

    async def main() -> None:
        async with runner(old) as served:
            with pytest.raises(UserError, match="no such file"):
                await served.swap(towers(new))
            assert await doubled(served, 4) == 8.0

    run(main)


def test_an_engine_that_cannot_load_says_why_when_the_runner_opens():
    doubler = Doubler()
    doubler.load_error = OSError("no space left")

    async def main() -> None:
        with pytest.raises(EngineFailedError, match="no space left; run 'edgeglm doctor'"):
            async with runner(doubler, instances=2):
                pass

    run(main)


def test_a_runner_that_is_not_open_says_so():
    async def main() -> None:
        served = runner(Doubler())
        with pytest.raises(UserError, match="use it in an 'async with' statement"):
            await doubled(served, 1)
        async with served:
            pass
        with pytest.raises(RunnerClosedError):
            await doubled(served, 1)
        with pytest.raises(UserError, match="opened once"):
            async with served:
                pass

    run(main)
