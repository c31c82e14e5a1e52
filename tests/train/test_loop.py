"""If these fail, a user's training runs on after it broke, or gives another model each time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.train.loop import (  # noqa: E402
    DivergedError,
    Group,
    fit,
    seeded,
    shuffled,
    steps_in,
    stretch_of,
    warmup_cosine,
)


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    rates = [warmup_cosine(step, total=100, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@given(total=st.integers(1, 500), warmup=st.integers(1, 50))
def test_no_step_has_a_rate_outside_zero_and_the_peak(total: int, warmup: int) -> None:
    warmup = max(1, min(warmup, total // 10))
    for step in range(total):
        assert 0.0 <= warmup_cosine(step, total=total, warmup=warmup) <= 1.0


def fitted(losses: list[float], *, epochs: int = 2, clip: float | None = None) -> list[float]:
    weight = torch.nn.Parameter(torch.ones(1))
    values = iter(losses)

    def loss_of(_: int) -> Any:
        return (weight * next(values)).sum() / weight.detach().sum()

    return fit(
        [Group(parameters=[weight], learning_rate=1e-3)],
        lambda _: range(3),
        loss_of,
        epochs=epochs,
        steps_per_epoch=3,
        clip=clip,
        title="Trial",
        progress=QuietProgress(),
    )


def test_the_curve_is_the_mean_loss_of_each_epoch() -> None:
    assert fitted([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx([2.0, 5.0])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_training_and_says_where(broken: float) -> None:
    with pytest.raises(DivergedError, match=r"Trial: .* at step 4 of epoch 1; lower the learning rate"):
        fitted([1.0, 1.0, 1.0, 1.0, broken, 1.0])


def test_training_reaches_a_minimum_that_is_known() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    goal = torch.tensor([1.0, -2.0])
    curve = fit(
        [Group(parameters=[weight], learning_rate=0.1)],
        lambda _: range(20),
        lambda _: ((weight - goal) ** 2).sum(),
        epochs=10,
        steps_per_epoch=20,
        title="Trial",
        progress=QuietProgress(),
    )
    torch.testing.assert_close(weight.detach(), goal, atol=1e-2, rtol=0)
    assert curve[-1] < 1e-3 * curve[0]


@given(count=st.integers(1, 300), size=st.integers(1, 80), seed=st.integers(0, 9))
def test_an_epoch_shows_no_image_twice_and_leaves_out_less_than_a_batch(
    count: int, size: int, seed: int
) -> None:
    batches = list(shuffled(count, size, seed=seed))
    shown = torch.cat(batches).tolist()
    assert len(batches) == steps_in(count, size)
    assert len(set(shown)) == len(shown)
    assert set(shown) <= set(range(count))
    assert count - len(shown) < size


def trained(seed: int) -> Any:
    with seeded(seed, threads=1):
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1))

        def batches(epoch: int) -> Iterator[Any]:
            for chosen in shuffled(32, 8, seed=epoch):
                yield torch.rand(8, 8) + chosen[:, None]

        fit(
            [Group(parameters=list(model.parameters()), learning_rate=1e-2, weight_decay=0.1)],
            batches,
            lambda x: (model(x) ** 2).mean(),
            epochs=2,
            steps_per_epoch=4,
            clip=1.0,
            title="Trial",
            progress=QuietProgress(),
        )
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_same_seed_gives_the_same_bits() -> None:
    first = trained(3)
    torch.rand(5)
    assert torch.equal(first, trained(3))
    assert not torch.equal(first, trained(4))


def test_what_was_set_before_a_seeded_part_is_set_after_it() -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()

    def broken() -> None:
        with seeded(1, threads=threads + 1):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_num_threads() == threads + 1
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@given(steps=st.integers(1, 5000))
def test_whole_stretches_make_up_the_steps(steps: int) -> None:
    length = stretch_of(steps, 25)
    assert 1 <= length <= 25
    assert steps % length == 0
    assert not any(steps % longer == 0 for longer in range(length + 1, min(steps, 25) + 1))
