from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.runtime.batch_queue import BatchPolicy, BatchQueue
from edgeglm.runtime.requests import Request

sizes = st.integers(1, 6)
policies = sizes.flatmap(
    lambda most: st.builds(
        BatchPolicy,
        max_batch_size=st.just(most),
        preferred_batch_sizes=st.lists(st.integers(1, most), max_size=2).map(tuple),
        max_queue_delay_microseconds=st.sampled_from([0, 1, 5]),
    )
)
arrivals = st.tuples(
    st.just("put"),
    st.sampled_from(["a", "b"]),
    st.sampled_from([8, 16]),
    st.integers(0, 2),
    st.sampled_from([None, 2, 20]),
)
steps = st.lists(
    st.one_of(
        arrivals,
        st.tuples(st.just("take")),
        st.tuples(st.just("wait"), st.integers(1, 9)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("evict"), st.integers(0, 2)),
    ),
    max_size=60,
)


def waiting(
    tower: str = "a",
    bucket: object = None,
    priority: int = 1,
    at: float = 0.0,
    deadline: float | None = None,
) -> Request:
    request = Request(tower, priority=priority, started=at, deadline=deadline)
    request.bucket = bucket
    return request


def queue(**settings: object) -> BatchQueue:
    return BatchQueue({"a": BatchPolicy(**settings), "b": BatchPolicy(**settings)})  # type: ignore[arg-type]


@given(policies, steps)
def test_every_request_leaves_once_in_order_and_in_a_batch_that_fits(
    policy: BatchPolicy, script: Sequence[tuple[Any, ...]]
):
    line = BatchQueue({"a": policy, "b": policy})
    now, present = 0.0, list[Request]()
    for step in script:
        if step[0] == "put":
            deadline = now + step[4] * 1e-6 if step[4] else None
            request = waiting(step[1], step[2], step[3], now, deadline)
            line.put(request)
            present.append(request)
        elif step[0] == "wait":
            now += step[1] * 1e-6
        elif step[0] == "remove" and present:
            request = present.pop(step[1] % len(present))
            assert line.remove(request)
            assert not line.remove(request)
        elif step[0] == "evict":
            worst = max((r.priority for r in present), default=-1)
            victim = line.evict(step[1])
            assert (victim is not None) == (worst > step[1])
            if victim is not None:
                assert victim.priority == worst
                present.remove(victim)
        elif step[0] == "take":
            ready = line.seconds_to_ready(now)
            batch = line.take(now)
            assert (len(batch) > 0) == (ready == 0)
            assert len(batch) <= policy.max_batch_size
            assert len({(r.tower, r.bucket) for r in batch}) <= 1
            if batch:
                same = [r for r in present if (r.tower, r.bucket) == (batch[0].tower, batch[0].bucket)]
                same.sort(key=lambda r: (r.priority, r.number))
                assert batch == same[: len(batch)]
                present = [r for r in present if r not in batch]
        assert len(line) == len(present)
    # An hour later everything leaves, whatever the delay.
    left: list[Request] = []
    while batch := line.take(now + 3600):
        left += batch
    assert sorted(r.number for r in left) == sorted(r.number for r in present)
    assert len(line) == 0
    assert line.seconds_to_ready(now) is None


@given(policies, st.integers(1, 12))
def test_nobody_waits_longer_than_the_delay_for_company(policy: BatchPolicy, count: int):
    line = BatchQueue({"a": policy})
    for _ in range(count):
        line.put(waiting())
    wait = line.seconds_to_ready(0.0)
    assert wait is not None
    assert wait <= policy.delay
    assert line.take(wait + 1e-9)


def test_a_preferred_size_goes_at_once_and_the_rest_waits_for_company():
    line = queue(max_batch_size=8, preferred_batch_sizes=(2, 4), max_queue_delay_microseconds=1000)
    looks = [line.put(waiting()) for _ in range(5)]
    assert looks == [True, True, False, True, False]
    assert len(line.take(0.0)) == 4
    assert line.take(0.0) == []
    assert len(line.take(0.002)) == 1


def test_a_deadline_that_is_nearer_than_the_delay_sends_the_batch_while_there_is_time():
    line = queue(max_batch_size=8, max_queue_delay_microseconds=1_000_000)
    assert line.put(waiting(at=0.0))
    assert line.seconds_to_ready(0.0) == 1.0
    hurried = waiting(at=0.1, deadline=0.3)
    assert line.put(hurried)
    assert not line.put(waiting(at=0.1, deadline=5.0))
    assert line.seconds_to_ready(0.1) == pytest.approx(0.1)
    assert line.take(0.19) == []
    assert len(line.take(0.2)) == 3


def test_once_who_was_in_a_hurry_has_gone_the_others_wait_for_company_again():
    line = queue(max_batch_size=2, max_queue_delay_microseconds=1_000_000)
    hurried, patient = waiting(deadline=0.2), waiting()
    line.put(hurried)
    line.put(patient)
    assert len(line.take(0.0)) == 2
    line.put(hurried)
    line.put(patient)
    line.remove(hurried)
    assert line.seconds_to_ready(0.1) == pytest.approx(0.9)
    assert line.take(0.1) == []


def test_one_that_came_late_and_was_asked_for_early_counts_from_when_it_was_asked_for():
    line = queue(max_batch_size=8, max_queue_delay_microseconds=1_000_000)
    line.put(waiting(at=0.5))
    assert line.seconds_to_ready(0.5) == 1.0
    assert line.put(waiting(at=0.0))
    assert line.seconds_to_ready(0.5) == pytest.approx(0.5)


def test_an_urgent_request_of_another_bucket_goes_first():
    line = queue()
    patient, urgent = waiting("a", priority=1), waiting("b", priority=0)
    line.put(patient)
    line.put(urgent)
    assert line.take(0.0) == [urgent]
    assert line.take(0.0) == [patient]


def test_buckets_of_odd_shapes_leave_nothing_behind():
    line = queue()
    for bucket in range(100):
        request = waiting(bucket=bucket)
        line.put(request)
        if bucket % 2:
            line.remove(request)
    while line.take(0.0):
        pass
    assert not line._buckets


def test_a_priority_that_never_comes_again_leaves_nothing_behind_in_a_queue_that_is_never_empty():
    line = queue(max_batch_size=1)
    line.put(waiting(priority=1000))
    for priority in range(100):
        taken, removed = waiting(priority=2 * priority), waiting(priority=2 * priority + 1)
        line.put(taken)
        line.put(removed)
        assert line.remove(removed)
        assert line.take(0.0) == [taken]
    assert [list(bucket.lines) for bucket in line._buckets.values()] == [[1000]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_batch_size": 0}, "give a whole number of at least 1"),
        ({"max_queue_delay_microseconds": -1}, "give a whole number, 0 or more"),
        ({"max_queue_delay_microseconds": sys.maxsize}, "is more than an hour; give at most 3600000000"),
        ({"max_batch_size": 4, "preferred_batch_sizes": (8,)}, "change it or max_batch_size"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        BatchPolicy(**settings)
