"""The rows of a request belong to the moment in which it was taken, and none outlives it."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from edgeglm.serve.together import all_of


class Rows:
    """Coroutines that say what served as they began, and which of them were told to end."""

    def __init__(self) -> None:
        self.serving = "former"
        self.ended: list[str] = []

    async def row(self, name: str, gate: asyncio.Event | None = None) -> str:
        began_under = self.serving
        try:
            await (gate.wait() if gate is not None else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.ended.append(name)
            raise
        return f"{name} {began_under}"

    async def bad(self) -> str:
        raise ValueError("bad row")

    async def late(self) -> str:
        await asyncio.sleep(0)
        raise ValueError("late row")

    async def at_once(self) -> str:
        return f"at once {self.serving}"

    def swap(self) -> None:
        self.serving = "new"


def test_a_swap_in_the_next_turn_of_the_loop_finds_all_rows_begun():
    async def main() -> None:
        rows = Rows()
        asyncio.get_running_loop().call_soon(rows.swap)
        found = await all_of([rows.row("a"), rows.at_once(), rows.row("b")])
        assert found == ["a former", "at once former", "b former"]
        assert rows.serving == "new"

    asyncio.run(main())


@pytest.mark.parametrize(("bad", "ended"), [("bad", ["a"]), ("late", ["a", "b"])])
def test_a_row_that_fails_at_once_or_later_ends_the_others(bad: str, ended: list[str]):
    async def main() -> None:
        rows, gate = Rows(), asyncio.Event()
        with pytest.raises(ValueError, match="row"):
            await all_of([rows.row("a", gate), getattr(rows, bad)(), rows.row("b", gate)])
        assert rows.ended == ended

    asyncio.run(main())


def test_two_rows_that_fail_in_one_turn_are_one_refusal_and_no_error_in_the_log():
    """The second one's future was asked by nobody: the server's log said so, as an error of its own."""

    async def main() -> None:
        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
        rows = Rows()
        with pytest.raises(ValueError, match="late row"):
            await all_of([rows.late(), rows.late()])
        gc.collect()
        assert not reports

    asyncio.run(main())


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_caller_who_leaves_ends_every_row_in_whatever_turn(turns: int):
    async def main() -> None:
        rows, gate = Rows(), asyncio.Event()
        asked = asyncio.ensure_future(all_of([rows.row("a", gate), rows.row("b", gate)]))
        await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert rows.ended == ["a", "b"]

    asyncio.run(main())
