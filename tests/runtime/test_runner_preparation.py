"""What callers would lose when tokenising or decoding fails or hangs: the inputs that it fell over."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from edgeglm.core.errors import EdgeglmError
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.requests import EngineFailedError, Sample
from edgeglm.runtime.runner import Runner
from tests.runtime.faults import HANG, LIMIT, Doubler, doubled, ended, run, sample


class Preparation:
    """Makes samples of numbers, and fails where a word tells it to."""

    def __init__(self) -> None:
        self.released, self.entered = threading.Event(), threading.Event()

    def __call__(self, inputs: Sequence[object]) -> list[Sample | EdgeglmError]:
        self.entered.set()
        if "hang" in inputs:
            assert self.released.wait(LIMIT)
        if "raise" in inputs:
            raise RuntimeError("a torn word")
        good = [sample(float(str(one))) for one in inputs if one not in ("hang", "lose")]
        return [*good]


def prepared(preparation: Preparation, **changes: Any) -> Runner:
    """A runner whose one tower doubles numbers given as words."""
    settings: dict[str, Any] = {"warm_up": False, "preparation_threads": 1, "hang_after": 5.0, **changes}
    tower = TowerSource(engine=Doubler(), prepare=preparation)
    return Runner({"double": tower}, RunnerConfig(**settings))


async def doubled_word(served: Runner, word: str) -> float:
    answer = await served._answer("double", raw=word, deadline=None, priority=1)
    return float(answer["y"][0])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("raise", "RuntimeError: a torn word"),
        ("lose", "0 samples were made of 1 inputs .* mend its preparation"),
    ],
)
def test_a_preparation_that_raises_or_miscounts_fails_the_one_that_it_fell_over(word: str, said: str):
    async def main() -> None:
        async with prepared(Preparation()) as served:
            words = ["1", word, "3", "4"]
            answers = await ended(*(doubled_word(served, one) for one in words))
            assert [answers[0], *answers[2:]] == [2.0, 6.0, 8.0]
            with pytest.raises(EngineFailedError, match=said):
                raise answers[1]
            assert served.stats().replaced == 0

    run(main)


def test_preparations_that_hang_are_replaced_and_cost_no_engine_its_place():
    preparation, doubler = Preparation(), Doubler()

    async def main() -> None:
        towers = {"double": TowerSource(engine=doubler, prepare=preparation)}
        config = RunnerConfig(warm_up=False, preparation_threads=1, hang_after=0.1, max_replacements=2)
        async with Runner(towers, config) as served:
            for _ in range(2):
                with pytest.raises(
                    EngineFailedError, match=r"did not return within 0\.1 s .* look at the input"
                ):
                    await doubled_word(served, "hang")
            for _ in range(2):  # as many as may hang: those before were of the other crew
                with pytest.raises(EngineFailedError, match="did not return"):
                    await doubled(served, HANG)
            assert await doubled_word(served, "4") == 8.0
            assert served.stats().replaced == 4
            with pytest.raises(EngineFailedError, match="did not return"):
                await doubled_word(served, "hang")
            with pytest.raises(EngineFailedError, match="3 preparation workers hung or died; restart"):
                await doubled(served, 1)
            preparation.released.set()
            doubler.released.set()

    run(main)
