"""What is wrong with a setting or a source must be said at once, and not by a runner that stops later."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeglm.core.errors import UserError
from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.requests import DeadlineExceededError, EngineFailedError
from edgeglm.runtime.runner import Runner
from tests.runtime.faults import HANG, Doubler, doubled, ended, held, run, runner, sample, towers, until

NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"capacity": 1.5}, "capacity is 1.5; give a whole number of at least 1"),
        ({"instances": 0}, "instances is 0; give a whole number of at least 1"),
        ({"instances": True}, "instances is True; give a whole number of at least 1"),
        ({"hang_after": True}, "hang_after is True; give seconds above 0"),
        ({"drain_timeout": True}, "drain_timeout is True; give seconds, 0 or more, or None"),
        ({"threads": "two"}, "threads is 'two'; give a whole number of at least 1"),
        ({"max_replacements": -1}, "max_replacements is -1; give a whole number of at least 0"),
        ({"hang_after": "x"}, "hang_after is 'x'; give seconds above 0"),
        ({"hang_after": NAN}, "hang_after is nan; give seconds above 0"),
        ({"open_timeout": 0}, "open_timeout is 0; give seconds above 0"),
        ({"drain_timeout": NAN}, "drain_timeout is nan; give seconds, 0 or more, or None"),
        ({"drain_timeout": -1}, "drain_timeout is -1; give seconds, 0 or more, or None"),
        ({"length_buckets": (8, "a")}, "length_buckets is .*; give whole numbers in a tuple"),
        ({"length_buckets": 8}, "length_buckets is 8; give whole numbers in a tuple"),
        ({"engine": "ort"}, "engine is 'ort'; give a function"),
        ({"warm_up": "no"}, "warm_up is 'no'; give True or False"),
        ({"when_full": "shad"}, "unknown behaviour when full 'shad'.*did you mean 'shed'"),
        ({"batching": 3}, "batching is a int; give a BatchPolicy, or one a tower"),
        ({"batching": {"double": None}}, "batching of 'double' is a NoneType; give a BatchPolicy"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        RunnerConfig(**settings)


@pytest.mark.parametrize("sizes", [(1.5,), ("4",), (True,), None, 4])
def test_preferred_batch_sizes_that_are_no_whole_numbers_are_refused(sizes: Any):
    with pytest.raises(UserError, match=r"preferred.batch.size.*; give "):
        BatchPolicy(preferred_batch_sizes=sizes)


def test_a_tower_with_lengths_that_are_no_numbers_is_refused():
    with pytest.raises(UserError, match=r"are no whole numbers; give such as"):
        TowerSource(engine=Doubler(), ragged={"x": 0}, length_buckets=(8, "a"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_size": 1.5},
        {"max_batch_size": True},
        {"max_queue_delay_microseconds": NAN},
        {"max_queue_delay_microseconds": False},
    ],
)
def test_a_batch_policy_that_makes_no_sense_is_refused(settings: dict[str, Any]):
    with pytest.raises(UserError, match="give a whole number"):
        BatchPolicy(**settings)


def test_numbers_of_numpy_are_as_good_as_pythons():
    policy = BatchPolicy(max_batch_size=np.int64(4), preferred_batch_sizes=(np.int32(2),))  # type: ignore[arg-type]
    settings = {"instances": np.int8(1), "hang_after": np.float32(3), "warm_up": np.False_}
    config = RunnerConfig(batching=policy, length_buckets=[np.int64(8)], **settings)  # type: ignore[arg-type]
    kept = (policy.max_batch_size, *policy.preferred_batch_sizes, config.instances, config.hang_after)
    assert [type(one) for one in (*kept, config.warm_up, *(config.length_buckets or ()))] == [
        *(int, int, int, float, bool, int)
    ]
    with pytest.raises(UserError, match="max_batch_size is 0; give"):
        BatchPolicy(max_batch_size=np.int64(0))  # type: ignore[arg-type]

    async def main() -> None:
        async with Runner(towers(Doubler()), config) as served:
            assert await doubled(served, 1, deadline=np.float32(5), priority=np.int64(0)) == 2.0
            with pytest.raises(UserError, match=r"the deadline is nan"):
                await doubled(served, 1, deadline=np.float32("nan"))
            with pytest.raises(DeadlineExceededError):
                await doubled(served, 1, deadline=np.float16(0))

    run(main)


def test_a_batch_policy_for_a_tower_that_is_not_there_names_those_that_are():
    async def main() -> None:
        with pytest.raises(UserError, match="unknown tower in batching 'duoble'; known: double"):
            async with runner(Doubler(), batching={"duoble": BatchPolicy()}):
                pass
        async with runner(Doubler(), batching={"double": BatchPolicy(max_batch_size=2)}) as served:
            assert await doubled(served, 1) == 2.0

    run(main)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("fruit.bundle", "'fruit.bundle' is a str; give the pathlib.Path of a bundle"),
        (3, "is a int; give the pathlib.Path"),
        ({"double": "x.onnx"}, "tower 'double' is a str; give a TowerSource"),
        ({1: TowerSource(engine=Doubler())}, "the name of a tower is a int; give a str"),
        ({}, "the source has no towers; give at least one"),
    ],
)
def test_what_is_no_source_is_refused_when_opened_and_when_swapped_to(source: Any, words: str):
    async def main() -> None:
        with pytest.raises(UserError, match=words):
            async with Runner(source):
                pass
        async with runner(Doubler()) as served:
            with pytest.raises(UserError, match=words):
                await served.swap(source)
            assert await doubled(served, 1) == 2.0

    run(main)


def test_a_path_without_a_bundle_is_refused_with_a_remedy(tmp_path: Path):
    async def main() -> None:
        with pytest.raises(UserError):
            async with Runner(tmp_path / "nothing.bundle"):
                pass

    run(main)


@pytest.mark.parametrize("tower", [3, None, ["a"], ("double",)])
def test_a_tower_that_is_no_name_is_the_callers_error_and_the_names_are_told(tower: Any):
    async def main() -> None:
        async with runner(Doubler()) as served:
            with pytest.raises(UserError, match=f"the tower is a {type(tower).__name__}; give .*: double"):
                await served.infer(tower, sample(1))
            assert await doubled(served, 2) == 4.0

    run(main)


@pytest.mark.parametrize(
    "options",
    [
        {"priority": "high"},
        {"priority": None},
        {"deadline": "soon"},
        {"deadline": NAN},
        {"deadline": True},
        {"deadline": 10**400},
        {"deadline": -(10**400)},
    ],
)
def test_a_priority_or_deadline_that_is_no_number_harms_nobody_else(options: dict[str, Any]):
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            running = await held(doubler, served, 1)
            waiting = asyncio.create_task(doubled(served, 2))
            with pytest.raises(UserError, match="; give "):
                await doubled(served, 3, **options)
            doubler.gate.set()
            assert [await running, await waiting] == [2.0, 4.0]
            assert served.stats().held == served.stats().replaced == 0

    run(main)


def test_a_sample_that_is_no_mapping_is_the_callers_error():
    async def main() -> None:
        async with runner(Doubler()) as served:
            with pytest.raises(UserError, match="a sample is a list; give "):
                await served.infer("double", [sample(1)])  # type: ignore[arg-type]

    run(main)


def test_nothing_in_place_of_an_input_is_told_what_to_give():
    async def main() -> None:
        async with runner(Doubler()) as served:
            words = "tower 'double' got None; give a text, an image, or {input name: array} to infer"
            with pytest.raises(UserError, match=words):
                await served.infer("double", None)  # type: ignore[arg-type]
            with pytest.raises(UserError, match="unknown tower 'doubel'"):
                await served.infer("doubel", None)  # type: ignore[arg-type]
            assert served.stats().held == 0

    run(main)


def test_a_queue_that_no_worker_can_read_fails_those_in_it_and_serves_the_next(monkeypatch):
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler) as served:
            assert served._current is not None
            queue = served._current.inference._queue
            take = queue.take

            def faulty(now: float) -> Any:
                if any(request.priority == 7 for request in queue):
                    raise TypeError("an order that there is not")
                return take(now)

            monkeypatch.setattr(queue, "take", faulty)
            answers = await ended(*(doubled(served, value, priority=7) for value in range(20)))
            assert all("an order that there is not" in str(answer) for answer in answers)
            assert await doubled(served, 2) == 4.0
            assert served.stats().replaced == 1
            assert served.stats().held == 0

    run(main)


def test_the_settings_that_every_figure_was_measured_with_give_up_a_hung_call():
    doubler = Doubler()

    async def main() -> None:
        async with Runner(towers(doubler), RunnerConfig()) as served:
            hung = asyncio.create_task(doubled(served, HANG))
            await until(lambda: [HANG] in doubler.batches)
            others = [asyncio.create_task(doubled(served, value)) for value in range(40)]
            with pytest.raises(EngineFailedError, match="did not return within 10 s"):
                await hung
            assert await asyncio.gather(*others) == [2.0 * value for value in range(40)]
            assert served.stats().replaced == 1
            doubler.released.set()

    run(main)


def test_the_names_of_the_docs_come_from_the_room_itself():
    import edgeglm.runtime as room

    assert room.Runner is Runner
    for name in room._HOMES:  # type: ignore[attr-defined]  # the stub has the names, not their homes
        assert getattr(room, name).__module__ == f"edgeglm.runtime.{room._HOMES[name]}"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="has no attribute 'Rumner'"):
        room.Rumner  # type: ignore[attr-defined]  # noqa: B018


def test_towers_given_as_any_mapping_are_served():
    from types import MappingProxyType

    async def main() -> None:
        async with Runner(MappingProxyType(towers(Doubler()))) as served:
            answer = await served.infer("double", MappingProxyType(sample(3)))
            assert answer["y"][0] == 6.0

    run(main)
