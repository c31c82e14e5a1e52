"""If these fail, a budget is broken silently, or a user is not told which student comes nearest."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the host half is not installed")

from hypothesis import given
from hypothesis import strategies as st

from edgeglm.build.student_sizes import (
    Budget,
    SizeCost,
    SizesConfig,
    StudentSizesStage,
    budget_of,
    chosen_size,
    on_front,
    read_sizes,
)
from edgeglm.cli import main as cli
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.stage import Context
from edgeglm.core.store import Store


def cost(size: str, ms: float, parameters: int) -> SizeCost:
    return SizeCost(
        size=size, image_ms=ms * 0.75, text_ms=ms * 0.25, parameters=parameters, file_bytes=4 * parameters
    )


COSTS = (cost("xs", 1.0, 2_000_000), cost("s", 2.0, 3_000_000), cost("m", 4.0, 6_000_000))
COST = st.builds(
    cost, st.sampled_from("abc"), st.floats(0.1, 100.0), st.integers(1_000_000, 50_000_000)
)  # fmt: skip


@pytest.mark.parametrize(
    ("latency", "memory", "expected"),
    [
        ("10ms", None, "m"),
        ("3 ms", None, "s"),
        ("1500us", None, "xs"),
        (None, "13MB", "s"),
        ("9ms", "9MB", "xs"),
    ],
)
def test_the_largest_student_within_all_budgets_is_taken(
    latency: str | None, memory: str | None, expected: str
) -> None:
    budget = budget_of(latency, memory)
    assert budget is not None
    assert chosen_size(COSTS, budget).size == expected


@given(costs=st.lists(COST, min_size=1, max_size=6), latency=st.floats(0.05, 200.0))
def test_what_is_taken_meets_the_budget_and_nothing_larger_does(
    costs: list[SizeCost], latency: float
) -> None:
    budget = Budget(latency_ms=latency)
    try:
        chosen = chosen_size(costs, budget)
    except UserError:
        assert all(each.latency_ms > latency for each in costs)
        return
    assert chosen.latency_ms <= latency
    assert not any(c.parameters > chosen.parameters and c.latency_ms <= latency for c in costs)
    best = [c for c in on_front(costs) if c.latency_ms <= latency]
    assert chosen.parameters == best[-1].parameters  # the choice lies on the front


def test_a_budget_that_no_student_meets_names_the_nearest_and_the_remedy() -> None:
    with pytest.raises(
        UserError, match=r"the nearest is xs with 1\.00 ms .* raise the budget to that, or lower"
    ):
        chosen_size(COSTS, Budget(latency_ms=0.5))
    with pytest.raises(UserError, match=r"latency 9 ms, memory 1 MB\): the nearest is xs"):
        chosen_size(COSTS, Budget(latency_ms=9.0, memory_bytes=1e6))


def test_a_size_that_is_slower_and_smaller_is_not_on_the_front() -> None:
    worse = cost("worse", 3.0, 2_500_000)
    assert [each.size for each in on_front((*COSTS, worse))] == ["xs", "s", "m"]


def test_budgets_are_read_in_their_units() -> None:
    assert budget_of("0.01 s", "2MiB") == Budget(latency_ms=10.0, memory_bytes=2 * 2**20)
    assert budget_of(None, None) is None


@pytest.mark.parametrize("text", ["", "fast", "-1ms", "0ms", "10mb", "1e3 ms"])
def test_an_unreadable_budget_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="write it as 10ms"):
        budget_of(text, None)


def test_a_size_and_a_budget_together_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["build", "--target", "cpu", "--set", "student.size=edge-m", "--latency-budget", "10ms"]
    assert cli.exit_code(given) == 2
    assert "leave one of them out" in " ".join(capsys.readouterr().err.split())


def test_measured_costs_are_kept_so_that_the_choice_stays(tmp_path: Path) -> None:
    config = SizesConfig(
        sizes=("edge-xs",), resolution=32, max_length=8, vocabulary=50, embedding_dim=8, opset=20
    )
    context = Context(store=Store(tmp_path / "store"), progress=QuietProgress(), threads=1)
    first = StudentSizesStage(config)({}, context)
    again = StudentSizesStage(config)({}, context)
    (found,) = read_sizes(first.artifact)
    assert again.reused
    assert read_sizes(again.artifact) == (found,)
    assert found.latency_ms > 0
    assert found.file_bytes > 4 * found.parameters * 0.95  # FP32 weights are what fills the files
