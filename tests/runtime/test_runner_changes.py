"""What callers would lose when a runner opens, changes its towers or runs several instances."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from edgeglm.core.errors import UserError
from edgeglm.engines.fake import FakeEngine
from edgeglm.engines.protocol import Feeds, TensorSpec
from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.requests import (
    EngineFailedError,
    RunnerClosedError,
)
from edgeglm.runtime.runner import Runner
from tests.runtime.faults import (
    LIMIT,
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


def test_a_swap_whose_caller_falls_over_the_news_keeps_no_engine_of_the_former_towers():
    old, new = Doubler(), Doubler(factor=3.0)

    def falls() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        async with runner(old) as served:
            with pytest.raises(ZeroDivisionError):
                await served.swap(towers(new), switched=falls)
            await until(lambda: not old.made[0].loaded)
            assert await doubled(served, 1) == 3.0

    run(main)


def test_an_engine_that_cannot_load_says_why_when_the_runner_opens():
    doubler = Doubler()
    doubler.load_error = OSError("no space left")

    async def main() -> None:
        with pytest.raises(EngineFailedError, match="no space left; run 'edgeglm doctor'"):
            async with runner(doubler, instances=2):
                pass

    run(main)


@pytest.mark.parametrize(
    ("made_for", "shapes"),
    [((), [(1, 2), (1, 5), (4, 5)]), ((1, 3, 9), [(1, 2), (1, 5), (3, 2), (3, 5), (4, 5)])],
)
def test_an_engine_is_called_with_every_shape_it_was_made_for_before_the_first_request(made_for, shapes):
    calls: list[tuple[int, ...]] = []

    class Bucketed(FakeEngine):
        bucket_batches = made_for

    def engine() -> Bucketed:
        def function(feeds: Feeds) -> list[np.ndarray]:
            calls.append(feeds["ids"].shape)
            return [feeds["ids"][:, :1]]

        inputs = [TensorSpec(name="ids", dtype="int64", shape=("B", "L"))]
        outputs = [TensorSpec(name="y", dtype="int64", shape=("B", 1))]
        return Bucketed(inputs=inputs, outputs=outputs, function=function)

    source = TowerSource(engine=engine, ragged={"ids": 0}, length_buckets=(2, 5))

    async def main() -> None:
        policy = BatchPolicy(max_batch_size=4)
        async with Runner({"text": source}, RunnerConfig(batching=policy)) as served:
            assert calls == shapes
            await served.infer("text", {"ids": np.ones(3, np.int64)})
            assert calls == [*shapes, (1, 3)]

    run(main)


def test_a_batch_that_an_engine_does_not_take_names_the_setting_that_asked_for_it():
    doubler = Doubler()

    def function(feeds: Feeds, _: object) -> list[np.ndarray]:
        if len(feeds["x"]) > 8:
            raise UserError("x of shape (32, 2) is outside the engine's profiles; feed a smaller batch")
        return [feeds["x"] * 2]

    doubler.function = function  # type: ignore[assignment]

    async def main() -> None:
        words = (
            r"'double' does not take a batch of 32: .*outside the engine's profiles; lower max_batch_size$"
        )
        with pytest.raises(UserError, match=words):
            async with runner(doubler, warm_up=True):
                pass
        async with runner(doubler, warm_up=True, batching=BatchPolicy(max_batch_size=8)) as served:
            assert await doubled(served, 3) == 6.0

    run(main)


def test_engines_that_do_not_open_in_time_are_given_up():
    released = threading.Event()

    def slow() -> FakeEngine:
        assert released.wait(LIMIT)
        return Doubler()()

    async def main() -> None:
        config = RunnerConfig(open_timeout=0.05, hang_after=0.1)
        with pytest.raises(EngineFailedError, match=r"did not open within 0.05 s; raise open_timeout"):
            async with Runner({"double": TowerSource(engine=slow)}, config):
                pass
        released.set()

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
