"""What callers would lose when an engine hangs, dies or fails: nothing but the calls that did."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from edgeglm.engines.fake import FakeEngine
from edgeglm.engines.protocol import Feeds, TensorSpec
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.crew import Crew
from edgeglm.runtime.ends import Ends
from edgeglm.runtime.requests import (
    EngineFailedError,
    Results,
    Sample,
)
from edgeglm.runtime.runner import Runner
from tests.runtime.faults import (
    HANG,
    LIMIT,
    MISCOUNT,
    NOT_A_NUMBER,
    POISON,
    WIDTH,
    Doubler,
    doubled,
    ended,
    held,
    run,
    runner,
    sample,
    until,
)


def test_the_error_of_a_bad_request_says_what_the_engine_said():
    async def main() -> None:
        async with runner(Doubler()) as served:
            with pytest.raises(EngineFailedError, match=r"RuntimeError: a poisoned sample; .*doctor"):
                await doubled(served, POISON)
            with pytest.raises(EngineFailedError, match=r"gave y of shape \[0, 2\] for 1 samples"):
                await doubled(served, MISCOUNT)
            with pytest.raises(EngineFailedError, match="gave NaN or infinity in y"):
                await doubled(served, NOT_A_NUMBER)

    run(main)


class SpeechlessError(Exception):
    """Raises itself where it is to say what it is."""

    def __str__(self) -> str:
        raise SpeechlessError


def test_an_engine_whose_errors_cannot_be_written_fails_its_callers_and_no_more():
    """They were never told, and their worker died."""
    doubler = Doubler()
    function = doubler.function

    def speechless(feeds: Feeds, engine: FakeEngine) -> Sequence[np.ndarray]:
        if POISON in feeds["x"]:
            raise SpeechlessError
        return function(feeds, engine)

    doubler.function = speechless  # type: ignore[method-assign]

    async def main() -> None:
        async with runner(doubler) as served:
            with pytest.raises(EngineFailedError, match=r"SpeechlessError: it cannot say more; .*doctor"):
                await asyncio.wait_for(doubled(served, POISON), LIMIT)
            assert await doubled(served, 2) == 4
            assert served.stats().replaced == 0

    run(main)


def test_a_hung_call_fails_its_callers_and_the_others_are_answered_by_a_new_instance():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, hang_after=0.2) as served:
            hung = asyncio.create_task(doubled(served, HANG))
            await until(doubler.entered.is_set)
            others = [asyncio.create_task(doubled(served, value)) for value in range(5)]
            with pytest.raises(EngineFailedError, match=r"did not return within 0.2 s .* raise hang_after"):
                await hung
            assert await asyncio.gather(*others) == [0.0, 2.0, 4.0, 6.0, 8.0]
            assert served.stats().replaced == 1
            assert len(doubler.made) == 2
            doubler.released.set()  # the late answer of the given-up worker must harm nobody
            assert await doubled(served, 21) == 42.0

    run(main)


def test_callers_who_left_while_a_poisoned_batch_ran_are_not_run_again():
    doubler = Doubler()
    begun, go = threading.Event(), threading.Event()
    plain = doubler.function

    def function(feeds: Feeds, engine: FakeEngine) -> Sequence[np.ndarray]:
        if len(feeds["x"]) > 1 and not begun.is_set():
            begun.set()
            assert go.wait(LIMIT)
        return plain(feeds, engine)

    doubler.function = function  # type: ignore[method-assign]

    async def main() -> None:
        async with runner(doubler) as served:
            blocker = await held(doubler, served, 1)
            tasks = [asyncio.create_task(doubled(served, v)) for v in (POISON, 2.0, 3.0, 4.0, 5.0, 6.0)]
            late = asyncio.create_task(doubled(served, 7.0, deadline=0.5))
            await asyncio.sleep(0)
            doubler.gate.set()
            await until(begun.is_set)
            for task in tasks[1:4]:
                task.cancel()
            await ended(*tasks[1:4], late)
            go.set()
            answers = await ended(blocker, *tasks)
            assert answers[0] == 2.0
            assert isinstance(answers[1], EngineFailedError)
            assert answers[5:] == [10.0, 12.0]
            assert served.stats().held == 0
        first, whole, *parts = doubler.batches
        assert (first, whole[0]) == ([1.0], POISON)
        assert not {2.0, 3.0, 4.0, 7.0} & {value for part in parts for value in part}

    run(main)


def test_what_a_hung_worker_had_not_begun_is_answered_by_its_replacement():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, hang_after=0.2) as served:
            blocker = await held(doubler, served, 1)
            # The poison splits this batch; its first half then hangs while the second has not begun.
            tasks = [asyncio.create_task(doubled(served, v)) for v in (HANG, HANG, POISON, 5.0)]
            await asyncio.sleep(0)
            doubler.gate.set()
            await blocker
            first, second, poisoned, good = await ended(*tasks)
            assert "did not return" in str(first)
            assert "did not return" in str(second)
            assert "poisoned" in str(poisoned)
            assert good == 10.0
        doubler.released.set()

    run(main)


def test_a_runner_whose_calls_all_hang_says_so_and_stops_making_threads():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, hang_after=0.05, max_replacements=2) as served:
            for _ in range(3):
                with pytest.raises(EngineFailedError):
                    await doubled(served, HANG)
            assert "restart the process" in served.lost
            with pytest.raises(EngineFailedError, match="restart the process"):
                await doubled(served, 1)
            assert len(doubler.made) == 3
            doubler.released.set()

    run(main)


@pytest.mark.parametrize("returns", [True, False])
def test_a_call_that_hung_long_ago_and_came_back_does_not_count(
    returns: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edgeglm.runtime.generation._FORGIVEN_AFTER", 0.3)
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, hang_after=0.05, max_replacements=1) as served:
            before = threading.active_count()
            for turn in range(3):
                with pytest.raises(
                    EngineFailedError, match="did not return" if returns or turn < 2 else "hung"
                ):
                    await doubled(served, HANG)
                if returns:
                    doubler.released.set()
                    await until(lambda: threading.active_count() == before)
                    doubler.released.clear()
                await asyncio.sleep(0.4)
            if returns:
                assert await doubled(served, 1) == 2.0
                assert served.stats().replaced == 3
            else:
                assert len(doubler.made) == 2
            doubler.released.set()

    run(main)


def test_requests_end_when_a_replacement_cannot_be_loaded():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, hang_after=0.1) as served:
            hung = asyncio.create_task(doubled(served, HANG))
            await until(doubler.entered.is_set)
            doubler.load_error = OSError("the file is gone")
            waiting = asyncio.create_task(doubled(served, 1))
            for answer in await ended(hung, waiting):
                assert isinstance(answer, EngineFailedError)
            with pytest.raises(EngineFailedError, match="the file is gone; run 'edgeglm doctor'"):
                await doubled(served, 1)
            doubler.released.set()

    run(main)


def test_an_instance_whose_replacement_could_not_be_loaded_is_made_up_for_later():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, hang_after=0.1, instances=2) as served:
            assert served.stats().instances == 2
            doubler.load_error = MemoryError("beside the engine that hangs")
            with pytest.raises(EngineFailedError, match="was given up"):
                await doubled(served, HANG)
            await until(lambda: served.stats().instances == 1)
            assert await doubled(served, 1) == 2.0
            doubler.load_error = None
            doubler.released.set()

            async def made_up_for() -> None:
                while served.stats().instances < 2:
                    assert await doubled(served, 1) == 2.0
                    await asyncio.sleep(0.01)

            await asyncio.wait_for(made_up_for(), LIMIT)
            await until(lambda: len(doubler.made) == 3)
            assert served.stats().replaced == 1

    run(main)


def test_an_engine_that_died_is_replaced_after_a_few_failures():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            assert await doubled(served, 1) == 2.0
            doubler.dead.add(doubler.made[0])
            for _ in range(3):
                with pytest.raises(EngineFailedError, match="illegal memory access"):
                    await doubled(served, 1)
            assert await doubled(served, 2) == 4.0
            assert served.stats().replaced == 1

    run(main)


def test_bad_requests_in_a_row_do_not_cost_a_good_engine_its_place():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            for _ in range(10):
                with pytest.raises(EngineFailedError):
                    await doubled(served, POISON)
            assert await doubled(served, 2) == 4.0
            assert served.stats().replaced == 0
            assert served.stats().batches == {"double": {1: 11}}

    run(main)


def test_a_fault_in_the_crew_itself_replaces_the_worker_and_loses_nobody(monkeypatch):
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            assert served._current is not None
            crew = served._current.inference
            deliver, faults = crew._deliver, [ZeroDivisionError("a bug")]

            def faulty(results: Results) -> None:
                if faults:
                    raise faults.pop()
                deliver(results)

            monkeypatch.setattr(crew, "_deliver", faulty)
            with pytest.raises(EngineFailedError, match="ZeroDivisionError: a bug"):
                await doubled(served, 1)
            assert await doubled(served, 2) == 4.0
            assert served.stats().replaced == 1

    run(main)


def test_a_runner_without_any_engine_recovers_once_one_can_be_loaded_again():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, hang_after=0.2) as served:
            hangs = asyncio.create_task(doubled(served, HANG))
            await until(doubler.entered.is_set)
            doubler.load_error = MemoryError("beside the engine that hangs")
            await ended(hangs)
            await until(lambda: served.stats().instances == 0)
            with pytest.raises(EngineFailedError, match="cannot be opened: MemoryError"):
                await doubled(served, 1)
            assert "cannot be opened: MemoryError" in served.broken
            assert served.lost == ""  # it may be opened yet
            doubler.released.set()
            doubler.load_error = None

            async def asks_until_answered() -> float:
                while True:
                    with contextlib.suppress(EngineFailedError):
                        return await doubled(served, 2)
                    await asyncio.sleep(0.01)

            assert await asks_until_answered() == 4.0
            assert len(doubler.made) == 2
            assert served.broken == ""
            assert await doubled(served, 3) == 6.0

    run(main)


def test_a_replacement_that_hangs_while_it_opens_is_given_up_though_no_request_is_held():
    """It was waited for until the process was started anew: the watchdog sleeps where nothing is held."""
    doubler, opens = Doubler(), threading.Event()
    tries: list[int] = []

    def engine() -> FakeEngine:
        tries.append(len(tries))
        if tries[-1] == 1:
            raise MemoryError("beside the engine that hangs")
        if tries[-1] == 2:
            opens.wait(LIMIT)
        return doubler()

    config = RunnerConfig(warm_up=False, hang_after=0.2, open_timeout=0.3)

    async def main() -> None:
        async with Runner({"double": TowerSource(engine=engine)}, config) as served:
            with pytest.raises(EngineFailedError, match="did not return within"):
                await doubled(served, HANG)
            await until(lambda: bool(served.broken))
            await until(lambda: not served.broken)
            assert await doubled(served, 2) == 4.0
            assert tries == [0, 1, 2, 3]
            assert served.stats().replaced == 2
            opens.set()
            doubler.released.set()

    run(main)


class NoMemory(np.ndarray):
    """An array of which no copy can be made."""

    def copy(self, order: Any = "C") -> NoMemory:
        raise MemoryError("for a copy")


def test_answers_that_find_no_memory_fail_and_keep_nobody_waiting():
    """They were dropped with a word in the log; callers without a deadline waited for ever."""

    def function(feeds: Feeds) -> list[np.ndarray]:
        answers = np.ndarray.__new__(
            NoMemory if feeds["x"][0, 0] == 0 else np.ndarray, feeds["x"].shape, "f4"
        )
        answers[:] = feeds["x"] * 2
        return [answers]

    def engine() -> FakeEngine:
        specs = [[TensorSpec(name=name, dtype="float32", shape=("B", WIDTH))] for name in "xy"]
        return FakeEngine(inputs=specs[0], outputs=specs[1], function=function)

    async def main() -> None:
        config = RunnerConfig(warm_up=False)
        async with Runner({"double": TowerSource(engine=engine)}, config) as served:
            for answer in await ended(doubled(served, 0), doubled(served, 0)):
                assert isinstance(answer, EngineFailedError)
                assert "MemoryError: for a copy; lower max_batch_size, or leave this process" in str(answer)
            assert await doubled(served, 2) == 4.0
            stats = served.stats()
            assert (stats.failed, stats.answered, stats.held) == (2, 1, 0)

    run(main)


def test_an_engine_that_exits_as_it_is_closed_does_not_hold_up_the_end():
    """Its worker was waited for through the whole of ``hang_after``, and counted as alive ever after."""
    doubler = Doubler()

    class Exits(FakeEngine):
        def close(self) -> None:
            raise SystemExit

    async def main() -> None:
        async with runner(doubler, hang_after=2 * LIMIT) as served:
            doubler.made[0].__class__ = Exits
            assert await doubled(served, 2) == 4.0
        assert served.stats().instances == 0

    run(main)


NO_THREAD = RuntimeError("can't start new thread")


class Threads:
    """Lets the process have so many more threads of a runner, then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception = NO_THREAD) -> None:
        self.left = 10
        start = threading.Thread.start

        def limited(thread: threading.Thread) -> None:
            if thread.name.startswith("edgeglm-"):
                if not self.left:
                    raise error
                self.left -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)


def test_a_watchdog_that_found_no_memory_once_looks_again(monkeypatch):
    """Who waited for a call that hung, then or ever after, waited for ever."""
    doubler, looks, told = Doubler(), [], []
    give_up_hung = Crew.give_up_hung

    def no_memory_at_first(crew: Crew, *limits: float) -> Any:
        looks.append(crew)
        if len(looks) == 1:
            raise MemoryError
        return give_up_hung(crew, *limits)

    monkeypatch.setattr(Crew, "give_up_hung", no_memory_at_first)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        async with runner(doubler, hang_after=0.2) as served:
            with pytest.raises(EngineFailedError, match="did not return within"):
                await asyncio.wait_for(doubled(served, HANG), LIMIT)
            assert await doubled(served, 2) == 4
            doubler.released.set()

    run(main)
    assert [type(error) for error in told] == [MemoryError]


def test_a_watchdog_that_found_no_memory_before_it_looked_at_anything_looks_again():
    """It took itself for one that was still to come, and so did every later request."""
    doubler = Doubler()

    class NoMemory(float):
        def __rsub__(self, other: float) -> float:
            raise MemoryError

    async def main() -> None:
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        async with runner(doubler, hang_after=0.2) as served:
            asked = asyncio.create_task(doubled(served, HANG))
            await until(doubler.entered.is_set)
            served._look_at = NoMemory(served._look_at)
            with pytest.raises(EngineFailedError, match="did not return within"):
                await asyncio.wait_for(asked, LIMIT)
            doubler.released.set()
        assert [type(error) for error in told] == [MemoryError]

    run(main)


@pytest.mark.parametrize("where", ["in the loop", "in the worker", "in the watchdog"])
def test_whoever_an_error_loses_on_the_way_is_found_and_told(where, monkeypatch):
    """No crew had them any more, and nobody looked for such requests: their callers waited for ever."""
    doubler = Doubler()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        async with runner(doubler, hang_after=0.2, drain_timeout=None) as served:
            generation = served._current
            assert generation is not None
            faults = [MemoryError() for _ in range(2)]

            def faulty(*_: Any) -> None:
                if faults:
                    raise faults.pop()

            value = 1.0
            with monkeypatch.context() as patch:
                if where == "in the loop":
                    patch.setattr(Ends, "fail", first(faulty, Ends.fail))
                    value = POISON
                elif where == "in the worker":  # and again as it ends, while it tells whom it served
                    crew = generation.inference
                    patch.setattr(crew, "_deliver", first(faulty, crew._deliver))
                else:
                    patch.setattr(generation, "_fail", first(faulty, generation._fail))
                    value = HANG
                with pytest.raises(EngineFailedError, match=r"lost on its way, .*; ask again"):
                    await asyncio.wait_for(doubled(served, value), LIMIT)
            assert await doubled(served, 2) == 4.0
            assert served.stats().held == 0
            doubler.released.set()

    run(main)


def first(fault: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs one function and, unless it raises, another."""

    def both(*arguments: Any, **options: Any) -> Any:
        fault(*arguments)
        return then(*arguments, **options)

    return both


@pytest.mark.parametrize("error", [NO_THREAD, MemoryError()])
def test_where_no_thread_replaces_one_that_hangs_callers_are_told_and_served_once_there_is_one(
    error, monkeypatch
):
    """The watchdog fell over it and never looked again: whoever had no deadline waited for ever."""
    doubler, threads = Doubler(), Threads(monkeypatch, error)

    async def main() -> None:
        async with runner(doubler, hang_after=0.2) as served:
            threads.left = 0
            with pytest.raises(EngineFailedError, match="did not return within"):
                await doubled(served, HANG)
            with pytest.raises(EngineFailedError, match=r"no thread for engine .*; raise the"):
                await doubled(served, 1)
            threads.left = 10
            await until(lambda: not served.broken)
            assert await doubled(served, 2) == 4.0
            doubler.released.set()

    run(main)


@pytest.mark.parametrize("threads", [0, 1])
def test_a_runner_that_gets_no_thread_says_so_and_leaves_nothing_behind(monkeypatch, threads: int):
    doubler = Doubler()
    Threads(monkeypatch).left = threads
    tower = TowerSource(engine=doubler, prepare=lambda words: [sample(1) for _ in words])

    async def main() -> None:
        with pytest.raises(EngineFailedError, match=r"no thread for .*; raise the limit of the process"):
            async with Runner({"text": tower}, RunnerConfig(warm_up=False)):
                pass
        assert not any(engine.loaded for engine in doubler.made)

    run(main)


def test_preparation_without_a_thread_is_made_up_for_later(monkeypatch):
    doubler, threads, hangs = Doubler(), Threads(monkeypatch), threading.Event()
    released = threading.Event()

    def prepare(words: Sequence[object]) -> list[Sample]:
        if hangs.is_set():
            released.wait(LIMIT)
        return [sample(1) for _ in words]

    tower = TowerSource(engine=doubler, prepare=prepare)
    config = RunnerConfig(warm_up=False, hang_after=0.2, preparation_threads=1)

    async def main() -> None:
        async with Runner({"text": tower}, config) as served:
            threads.left = 0
            hangs.set()
            with pytest.raises(EngineFailedError, match=r"preparation .* did not return"):
                await served._answer("text", raw="a", deadline=None, priority=1)
            with pytest.raises(EngineFailedError, match="no thread for preparation"):
                await served._answer("text", raw="a", deadline=None, priority=1)
            hangs.clear()
            threads.left = 10
            await until(lambda: not served.broken)
            assert (await served._answer("text", raw="a", deadline=None, priority=1))["y"][0] == 2.0
            released.set()

    run(main)


@pytest.mark.parametrize("outputs", [0, 2])
def test_an_engine_that_gives_another_number_of_outputs_is_not_the_callers_fault(outputs: int):
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            doubler.made[0]._function = lambda feeds: [feeds["x"]] * outputs
            with pytest.raises(EngineFailedError, match=f"declares 1 outputs .* gave {outputs}; export"):
                await doubled(served, 1)

    run(main)
