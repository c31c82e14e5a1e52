"""What callers of a runner would lose: the answer to their own sample, and their own errors."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Sequence

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
from edgeglm.runtime.mailbox import _Bell
from edgeglm.runtime.requests import (
    EngineFailedError,
    Request,
    Results,
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
    held,
    run,
    runner,
    sample,
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
            first = await held(doubler, served, 1)
            rest = [asyncio.create_task(doubled(served, value)) for value in range(2, 12)]
            await asyncio.sleep(0)
            doubler.gate.set()
            assert await asyncio.gather(first, *rest) == [2.0 * value for value in range(1, 12)]
            assert served.stats().batches == {"double": {1: 1, 10: 1}}

    run(main)


@pytest.mark.skipif(sys.platform != "linux", reason="there are no eventfds")
def test_the_loop_is_woken_once_a_batch(monkeypatch):
    rings: list[bool] = []
    ring = _Bell.ring

    def counted(bell: _Bell, *, idle: bool) -> None:
        rings.append(idle)
        ring(bell, idle=idle)

    monkeypatch.setattr(_Bell, "ring", counted)
    doubler, go = Doubler(), threading.Event()
    plain = doubler.function

    def function(feeds: Feeds, engine: FakeEngine) -> Sequence[np.ndarray]:
        assert len(feeds["x"]) == 1 or go.wait(20)
        return plain(feeds, engine)

    doubler.function = function  # type: ignore[method-assign]

    async def main() -> None:
        async with runner(doubler, hang_after=1000.0) as served:
            first = await held(doubler, served, 1)
            rest = [asyncio.create_task(doubled(served, value)) for value in range(32)]
            await asyncio.sleep(0)
            rings.clear()
            doubler.gate.set()
            assert await first == 2.0
            assert rings == [False]  # as the second call began
            go.set()
            await asyncio.gather(*rest)
            assert rings == [False, True]  # as nothing was left to do
            assert served.stats().batches == {"double": {1: 1, 32: 1}}

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


def test_a_deadline_that_is_shorter_than_the_delay_is_kept_by_an_idle_engine():
    async def main() -> None:
        policy = BatchPolicy(max_queue_delay_microseconds=300_000_000)
        async with runner(Doubler(), batching=policy) as served:
            patient = asyncio.create_task(doubled(served, 1.0))
            await until(lambda: served.stats().waiting == 1)
            assert await doubled(served, 2.0, deadline=2.0) == 4.0
            assert await patient == 2.0
            assert served.stats().batches == {"double": {2: 1}}

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
            first = await held(doubler, served, 1)
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


def test_who_was_asked_again_beside_nan_is_not_put_beside_newcomers_that_may_hold_it_too():
    """Where one in ten holds NaN hardly a batch has none: good ones were asked again till their deadline."""
    doubler, turns = Doubler(), threading.Semaphore(0)

    def in_turn(feeds: Feeds, _: object) -> list[np.ndarray]:
        doubler.batches.append(feeds["x"][:, 0].tolist())
        assert turns.acquire(timeout=20)
        return [feeds["x"] * 2]

    doubler.function = in_turn  # type: ignore[assignment]

    async def main() -> None:
        async with runner(doubler) as served:
            nan = float("nan")
            tasks = [asyncio.create_task(doubled(served, 1))]
            await until(lambda: len(doubler.batches) == 1)
            tasks += [asyncio.create_task(doubled(served, value)) for value in (2, nan)]
            await asyncio.sleep(0)
            turns.release()
            await until(lambda: len(doubler.batches) == 2)
            tasks.append(asyncio.create_task(doubled(served, nan)))
            await asyncio.sleep(0)
            turns.release()
            await until(tasks[2].done)  # and the one beside it waits once more
            tasks.append(asyncio.create_task(doubled(served, nan)))
            await asyncio.sleep(0)
            turns.release(10)
            answers = await ended(*tasks)
            assert answers[:2] == [2.0, 4.0]
            assert all(isinstance(answer, UserError) for answer in answers[2:])
            assert doubler.batches[3] == [2.0]

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


def test_answers_in_a_buffer_that_the_next_call_fills_are_each_callers_own():
    buffer = np.zeros((8, WIDTH), np.float32)

    class Refilled(Doubler):
        def function(self, feeds: Feeds, engine: FakeEngine) -> Sequence[np.ndarray]:
            rows = buffer[: len(feeds["x"])]
            np.multiply(feeds["x"], 2, out=rows)
            return [rows]

    async def main() -> None:
        async with runner(Refilled(), batching=BatchPolicy(max_batch_size=4)) as served:
            answers = await asyncio.gather(*(doubled(served, float(value)) for value in range(200)))
            assert answers == [2.0 * value for value in range(200)]

    run(main)


@pytest.mark.parametrize(
    ("tower", "feeds", "words"),
    [
        ("duoble", sample(1), "unknown tower 'duoble'; known: double; did you mean 'double'"),
        ("double", {}, "no feed for x"),
        ("double", {"x": np.zeros(WIDTH, np.float32), "z": np.zeros(1)}, "no input is named z"),
        ("double", {"x": np.zeros(WIDTH, np.float32), 3: np.zeros(1)}, "no input is named 3"),
        ("double", {"x": np.zeros(3, np.float32)}, "make axis 1 2 long"),
        ("double", {"x": np.zeros((1, WIDTH), np.float32)}, "give it 2 dimensions"),
        ("double", {"x": np.zeros(WIDTH)}, "x is float64"),
        ("double", {"x": np.zeros(WIDTH, ">f4")}, "float32 of another machine's byte order"),
        ("double", {"x": [0.0, 1.0]}, "feed a numpy array"),
        ("double", {"x": np.ma.zeros(2, np.float32)}, "is a masked array; feed what"),
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
    st.sampled_from(["float16", "float32", "float64", "int64", "complex64"]),
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
