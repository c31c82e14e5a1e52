"""What callers of a runner would lose: answers, their own errors, their place, their time."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.engines.fake import FakeEngine
from edgeglm.engines.protocol import Feeds, TensorSpec
from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.requests import (
    DeadlineExceededError,
    EngineFailedError,
    OverloadedError,
    Priority,
    Request,
    Results,
    RunnerClosedError,
    is_finite,
    rows_of,
)
from edgeglm.runtime.runner import Runner
from tests.runtime.faults import (
    HANG,
    MISCOUNT,
    NOT_A_NUMBER,
    POISON,
    WIDTH,
    Doubler,
    doubled,
    ended,
    run,
    runner,
    sample,
    towers,
    until,
)


def test_each_caller_gets_the_answer_to_its_own_sample():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            answers = await asyncio.gather(*(doubled(served, value) for value in range(200)))
        assert answers == [2.0 * value for value in range(200)]

    run(main)
    assert len(doubler.batches) < 200
    assert not any(engine.loaded for engine in doubler.made)


def test_requests_that_come_during_a_call_share_the_next():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            doubler.gate.clear()
            first = asyncio.create_task(doubled(served, 1))
            await until(doubler.entered.is_set)
            rest = [asyncio.create_task(doubled(served, value)) for value in range(2, 12)]
            await asyncio.sleep(0)
            doubler.gate.set()
            assert await asyncio.gather(first, *rest) == [2.0 * value for value in range(1, 12)]
            assert served.stats().batches == {"double": {1: 1, 10: 1}}

    run(main)


def test_an_answer_does_not_wait_for_the_call_after_it():
    doubler = Doubler()

    async def main() -> None:
        one_by_one = BatchPolicy(max_batch_size=1)
        async with runner(doubler, hang_after=1000.0, batching=one_by_one) as served:
            slow = [asyncio.create_task(doubled(served, value)) for value in (1, HANG)]
            assert await slow[0] == 2.0
            assert not slow[1].done()
            doubler.released.set()
            assert await slow[1] == 2.0 * HANG

    run(main)


def test_the_delay_gathers_a_batch_of_the_preferred_size():
    doubler = Doubler()
    policy = BatchPolicy(max_batch_size=8, preferred_batch_sizes=(4,), max_queue_delay_microseconds=5_000_000)

    async def main() -> None:
        async with runner(doubler, batching=policy) as served:
            tasks = [asyncio.create_task(doubled(served, value)) for value in range(3)]
            await asyncio.sleep(0.05)
            assert not doubler.batches
            tasks.append(asyncio.create_task(doubled(served, 3)))
            await asyncio.gather(*tasks)
        assert doubler.batches == [[0.0, 1.0, 2.0, 3.0]]

    run(main)


def test_close_does_not_wait_out_the_delay():
    doubler = Doubler()

    async def main() -> None:
        policy = BatchPolicy(max_queue_delay_microseconds=300_000_000)
        async with runner(doubler, batching=policy) as served:
            answer = asyncio.create_task(doubled(served, 4))
            await asyncio.sleep(0)
        assert answer.done()
        assert await answer == 8.0

    run(main)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, POISON, MISCOUNT, NOT_A_NUMBER]), min_size=1, max_size=12),
    st.integers(1, 12),
)
def test_a_bad_request_fails_alone(values: list[float], most: int):
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, batching=BatchPolicy(max_batch_size=most)) as served:
            doubler.gate.clear()
            tasks = [asyncio.create_task(doubled(served, value)) for value in values]
            await asyncio.sleep(0)
            doubler.gate.set()
            for value, answer in zip(values, await ended(*tasks), strict=True):
                if value in (POISON, MISCOUNT, NOT_A_NUMBER):
                    assert isinstance(answer, EngineFailedError)
                else:
                    assert answer == 2 * value
            stats = served.stats()
            assert stats.answered + stats.failed == stats.accepted == len(values)
            assert stats.held == stats.waiting == 0

    run(main)


def test_one_sample_with_nan_does_not_spoil_the_answers_of_its_batch():
    """As dynamic quantization does, this engine scales a batch by its largest number."""
    doubler = Doubler()

    def scaled(feeds: Feeds, _: object) -> list[np.ndarray]:
        doubler.batches.append(feeds["x"][:, 0].tolist())
        doubler.entered.set()
        assert doubler.gate.wait(20)
        return [feeds["x"] / feeds["x"].max() * feeds["x"].max() * 2]

    doubler.function = scaled  # type: ignore[assignment]

    async def main() -> None:
        async with runner(doubler) as served:
            doubler.gate.clear()
            first = asyncio.create_task(doubled(served, 1))
            await until(doubler.entered.is_set)
            values = [2.0, float("nan"), 3.0, float("inf"), 4.0]
            tasks = [asyncio.create_task(doubled(served, value)) for value in values]
            await asyncio.sleep(0)
            doubler.gate.set()
            assert await first == 2.0
            answers = await ended(*tasks)
            assert [answers[0], answers[2], answers[4]] == [4.0, 6.0, 8.0]
            assert all(isinstance(answer, UserError) for answer in (answers[1], answers[3]))
            assert doubler.batches[-1] == [2.0, 3.0, 4.0]
            assert (served.stats().answered, served.stats().failed) == (4, 2)

    run(main)


def test_nan_in_much_data_is_found_in_the_engines_thread_and_fails_alone():
    width = 700_000  # 2.8 MB a sample
    spec = [TensorSpec(name="x", dtype="float32", shape=("B", width))]
    source = TowerSource(
        engine=lambda: FakeEngine(inputs=spec, outputs=spec, function=lambda feeds: [feeds["x"] * 2])
    )

    async def main() -> None:
        async with Runner({"wide": source}, RunnerConfig(warm_up=False)) as served:
            good, bad = np.ones(width, np.float32), np.ones(width, np.float32)
            bad[-1] = np.nan
            asks = [served.infer("wide", {"x": array}) for array in (good, bad, good)]
            first, second, third = await ended(*asks)
            assert isinstance(second, UserError)
            assert (first["x"] == 2).all()
            assert (third["x"] == 2).all()

    run(main)


def test_a_sample_that_is_a_slice_of_something_is_answered():
    async def main() -> None:
        async with runner(Doubler()) as served:
            answer = await served.infer("double", {"x": np.arange(6, dtype=np.float32)[1::3]})
            assert answer["y"].tolist() == [2.0, 8.0]

    run(main)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 70_000)])
@pytest.mark.parametrize("outputs", [1, 2])
def test_an_answer_is_the_callers_own(shape: tuple[int, ...], outputs: int):
    arrays = {f"y{i}": np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for i in range(outputs)}
    requests = [Request("double") for _ in range(shape[0])]
    rows = list(rows_of(Results(requests, arrays)))
    for row, answer in enumerate(rows):
        assert answer.keys() == arrays.keys()
        for name, array in arrays.items():
            assert answer[name].shape == shape[1:]
            assert (answer[name] == array[row]).all()
            assert not np.shares_memory(answer[name], array)
            base = answer[name].base
            kept = answer[name] if base is None else base
            assert kept.nbytes <= max(2**16, answer[name].nbytes)


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


def test_what_a_hung_worker_had_not_begun_is_answered_by_its_replacement():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, hang_after=0.2) as served:
            doubler.gate.clear()
            blocker = asyncio.create_task(doubled(served, 1))
            await until(doubler.entered.is_set)
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
            with pytest.raises(EngineFailedError, match="restart the process"):
                await doubled(served, 1)
            assert len(doubler.made) == 3
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


def test_a_deadline_ends_a_request_that_waits_and_the_engine_never_sees_it():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            doubler.gate.clear()
            first = asyncio.create_task(doubled(served, 1))
            await until(doubler.entered.is_set)
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
            doubler.gate.clear()
            first = asyncio.create_task(doubled(served, 1))
            await until(doubler.entered.is_set)
            started = time.monotonic()
            second = asyncio.create_task(doubled(served, 2, deadline=0.6))
            await asyncio.sleep(0.4)
            first.cancel()  # the second gets the place, and the engine is still busy
            with pytest.raises(DeadlineExceededError):
                await second
            assert time.monotonic() - started < 0.98
            doubler.gate.set()

    run(main)


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan")])
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
            doubler.gate.clear()
            running = asyncio.create_task(doubled(served, 1))
            await until(doubler.entered.is_set)
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
            doubler.gate.clear()
            tasks = [asyncio.create_task(doubled(served, 0))]
            await until(doubler.entered.is_set)
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
            doubler.gate.clear()
            running = asyncio.create_task(doubled(served, 1))
            await until(doubler.entered.is_set)
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


@pytest.mark.parametrize(
    ("tower", "feeds", "words"),
    [
        ("duoble", sample(1), "unknown tower 'duoble'; known: double; did you mean 'double'"),
        ("double", {}, "no feed for x"),
        ("double", {"x": np.zeros(WIDTH, np.float32), "z": np.zeros(1)}, "no input is named z"),
        ("double", {"x": np.zeros(3, np.float32)}, "make axis 1 2 long"),
        ("double", {"x": np.zeros((1, WIDTH), np.float32)}, "give it 2 dimensions"),
        ("double", {"x": np.zeros(WIDTH)}, "x is float64"),
        ("double", {"x": [0.0, 1.0]}, "feed a numpy array"),
        ("double", sample(float("nan")), "NaN or infinity; feed finite numbers"),
        ("double", sample(float("inf")), "NaN or infinity; feed finite numbers"),
    ],
)
def test_bad_input_is_the_callers_error_with_a_remedy(tower, feeds, words):
    async def main() -> None:
        async with runner(Doubler()) as served:
            good = asyncio.create_task(doubled(served, 5))
            with pytest.raises(UserError, match=words):
                await served.infer(tower, feeds)
            assert await good == 10.0
            with pytest.raises(UserError, match="takes arrays only; use infer"):
                await served._answer("double", raw="text", deadline=None, priority=1)
            assert served.stats().held == 0

    run(main)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["float16", "float32", "float64", "int64"]),
    st.integers(1, 40_000),
    st.sampled_from([0.0, 1.0, 60_000.0, float("nan"), float("inf"), float("-inf")]),
)
def test_large_numbers_are_finite_and_one_nan_among_them_is_not(dtype: str, size: int, odd: float):
    if dtype == "int64" and not np.isfinite(odd):
        odd = 0.0
    array = np.full(size, 60_000, dtype)
    if dtype in ("float32", "float64"):
        array[:] = np.finfo(dtype).max  # the sum overflows, the numbers do not
    array[size // 2] = odd
    assert is_finite(array) == bool(np.isfinite(odd))


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
