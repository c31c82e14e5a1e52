"""A runner that is cancelled at any await, or closed at an awkward moment, loses nothing."""

from __future__ import annotations

import asyncio
import threading

import pytest

from edgeglm.engines.fake import FakeEngine
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.mailbox import Mailbox
from edgeglm.runtime.opening import OpenedSource
from edgeglm.runtime.requests import RunnerClosedError
from edgeglm.runtime.runner import Runner
from tests.runtime.faults import (
    LIMIT,
    Doubler,
    doubled,
    ended,
    held,
    run,
    runner,
    towers,
    until,
)

STEPS = range(14)


async def steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("count", STEPS)
def test_a_caller_cancelled_at_any_await_leaves_its_place_free(count):
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, capacity=1) as served:
            doubler.gate.clear()
            tasks = [asyncio.create_task(doubled(served, value)) for value in range(3)]
            await steps(count)
            if count % 2:
                doubler.gate.set()
                await steps(count // 2)
            for task in tasks:
                task.cancel()
            await ended(*tasks)
            doubler.gate.set()
            assert served.stats().held == 0
            assert await doubled(served, 5) == 10.0
            stats = served.stats()
            assert stats.accepted == stats.answered + stats.cancelled

    run(main)


@pytest.mark.parametrize("count", STEPS)
def test_cancelled_while_it_opens_a_runner_closes_every_engine(count):
    doubler = Doubler()

    async def main() -> None:
        before = threading.active_count()
        served = runner(doubler, instances=2)
        opening = asyncio.create_task(served.__aenter__())
        await steps(count)
        opening.cancel()
        await ended(opening)
        await served.close()
        await until(lambda: threading.active_count() == before)
        assert not any(engine.loaded for engine in doubler.made)

    run(main)


@pytest.mark.parametrize("count", range(1, 5))
def test_cancelled_twice_while_it_opens_a_runner_keeps_no_bundle_and_no_mailbox_open(count, monkeypatch):
    release, mailboxes, closed = threading.Event(), list[Mailbox](), list[str]()

    def slow() -> FakeEngine:
        assert release.wait(LIMIT)
        return Doubler()()

    opened = OpenedSource(towers={"slow": TowerSource(engine=slow)}, close=lambda: closed.append("x"))

    async def source(*_: object) -> OpenedSource:
        return opened

    def mailbox(loop: asyncio.AbstractEventLoop) -> Mailbox:
        mailboxes.append(Mailbox(loop))
        return mailboxes[-1]

    monkeypatch.setattr("edgeglm.runtime.runner.opened_source", source)
    monkeypatch.setattr("edgeglm.runtime.generation.Mailbox", mailbox)

    async def main() -> None:
        opening = asyncio.create_task(Runner(opened.towers).__aenter__())
        await steps(4)
        opening.cancel()
        await steps(count)
        opening.cancel()
        await ended(opening)
        release.set()
        assert closed == ["x"]
        assert [one._open for one in mailboxes] == [False]

    run(main)


@pytest.mark.parametrize("count", STEPS)
def test_a_swap_cancelled_at_any_await_leaves_one_set_of_towers_in_service(count):
    old, new = Doubler(), Doubler()

    async def main() -> None:
        async with runner(old) as served:
            swapping = asyncio.create_task(served.swap(towers(new)))
            await steps(count)
            if count % 3 == 0:
                await asyncio.sleep(0.002)
            swapping.cancel()
            await ended(swapping)
            assert await doubled(served, 5) == 10.0
            await until(lambda: sum(engine.loaded for engine in (*old.made, *new.made)) == 1)
        assert not any(engine.loaded for engine in (*old.made, *new.made))

    run(main)


@pytest.mark.parametrize("count", STEPS)
def test_close_may_be_cancelled_and_called_again(count):
    doubler = Doubler()

    async def main() -> None:
        served = await runner(doubler).__aenter__()
        answer = await held(doubler, served, 2)
        closing = asyncio.create_task(served.close())
        await steps(count)
        closing.cancel()
        await ended(closing)
        doubler.gate.set()
        await served.close()
        assert await answer == 4.0
        assert not doubler.made[0].loaded

    run(main)


@pytest.mark.parametrize("count", STEPS)
def test_a_with_statement_that_is_cancelled_as_it_ends_leaves_no_engine_open(count):
    """As by ``asyncio.timeout``. Nobody closed such a runner: it kept its engines till the process ended."""
    doubler = Doubler()
    answers: list[asyncio.Task[float]] = []
    left: list[Runner] = []

    async def served() -> None:
        async with runner(doubler, drain_timeout=None) as open_one:
            left.append(open_one)
            answers.append(await held(doubler, open_one, 2))

    async def main() -> None:
        serving = asyncio.create_task(served())
        await until(lambda: bool(answers))
        await steps(count)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        with pytest.raises(RunnerClosedError, match="before an answer"):
            await answers[0]
        assert left[0].stats().batches == {"double": {1: 1}}, "what it did stays in its books"
        doubler.gate.set()
        await until(lambda: not doubler.made[0].loaded)

    run(main)


def test_close_during_a_swap_leaves_no_engine_open():
    old, new = Doubler(), Doubler()

    async def main() -> None:
        async with runner(old) as served:
            swapping = asyncio.create_task(served.swap(towers(new)))
            await asyncio.sleep(0)
        await ended(swapping)
        assert not any(engine.loaded for engine in (*old.made, *new.made))

    run(main)


def test_a_runner_that_is_closed_while_it_opens_does_not_open():
    doubler, loading, go = Doubler(), threading.Event(), threading.Event()

    def slow() -> FakeEngine:
        loading.set()
        assert go.wait(LIMIT)
        return doubler()

    async def main() -> None:
        served = Runner({"double": TowerSource(engine=slow)}, RunnerConfig(warm_up=False))
        opening = asyncio.create_task(served.__aenter__())
        await until(loading.is_set)
        await served.close()
        go.set()
        with pytest.raises(RunnerClosedError, match="closed while it loaded; open another one"):
            await opening
        assert served.closing
        assert not doubler.made[0].loaded

    run(main)
