"""What a script would lose in the blocking runner: rows, the first error, threads, loops and its own exit."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.fake import FakeEngine
from edgeglm.engines.protocol import TensorSpec
from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.requests import EngineFailedError, RunnerClosedError, Sample
from edgeglm.runtime.sync import SyncRunner
from tests.runtime.faults import LIMIT

pytestmark = pytest.mark.filterwarnings("error")
DECLARED = 3


class Words:
    """A text tower whose embedding is the number that a text is; "bad" and "worse" are none."""

    def __init__(self, *, width: int | str = DECLARED, more: float = 0.0) -> None:
        self.width, self.more = width, more
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def engine(self) -> FakeEngine:
        def function(feeds: Any) -> list[np.ndarray]:
            self.entered.set()
            assert self.gate.wait(LIMIT)
            return [np.repeat(feeds["x"], DECLARED, axis=1) + np.float32(self.more)]

        return FakeEngine(
            inputs=[TensorSpec(name="x", dtype="float32", shape=("B", 1))],
            outputs=[TensorSpec(name="embedding", dtype="float32", shape=("B", self.width))],
            function=function,
        )

    def prepare(self, texts: Sequence[object]) -> list[Sample | EdgeglmError]:
        return [
            UserError(f"{text} is no number; give one")
            if text in ("bad", "worse")
            else {"x": np.full(1, float(str(text)), np.float32)}
            for text in texts
        ]


def towers(words: Words) -> dict[str, TowerSource]:
    return {"text": TowerSource(engine=words.engine, prepare=words.prepare)}


def script(words: Words, **changes: Any) -> SyncRunner:
    return SyncRunner(towers(words), RunnerConfig(warm_up=False, **changes))


@pytest.mark.parametrize(("width", "shape"), [(DECLARED, (0, DECLARED)), ("D", (0, 0))])
def test_no_texts_are_no_rows_of_the_declared_width(width: int | str, shape: tuple[int, int]):
    with script(Words(width=width)) as served:
        found = served.embed_texts([])
        assert found.shape == shape
        assert found.dtype == np.float32
        assert served.embed_texts(["1", "2"]).shape == (2, DECLARED)


@pytest.mark.parametrize("when_full", ["shed", "wait"])
def test_a_list_longer_than_the_capacity_is_answered_in_order(when_full: str):
    with script(Words(), capacity=3, when_full=when_full) as served:
        found = served.embed_texts([str(number) for number in range(50)])
        assert found[:, 0].tolist() == list(range(50))
        assert served.stats().shed == 0


def test_a_list_that_meets_a_swap_has_the_rows_of_one_bundle():
    """Rows of two spaces in one array rank one another, and nobody is told."""
    former, fresh, found = Words(), Words(more=100.0), []
    with script(former, capacity=4, batching=BatchPolicy(max_batch_size=1)) as served:
        former.gate.clear()
        asks = threading.Thread(target=lambda: found.append(served.embed_texts([*map(str, range(20))])))
        asks.start()
        assert former.entered.wait(LIMIT)
        swaps = threading.Thread(target=served.swap, args=(towers(fresh),))
        swaps.start()
        until = time.monotonic() + LIMIT
        while len(served._runner._generations) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        former.gate.set()
        for thread in (asks, swaps):
            thread.join(LIMIT)
    assert found[0][:, 0].tolist() == [100.0 + number for number in range(20)]


def test_a_list_during_which_the_bundle_is_swapped_again_and_again_ends_with_what_to_do():
    with script(Words(), capacity=4) as served:
        embed = served._runner.embed_text

        async def swapped(*given: Any, **options: Any) -> Any:
            served._runner.swaps += 1
            return await embed(*given, **options)

        served._runner.embed_text = swapped  # type: ignore[method-assign]
        with pytest.raises(UserError, match="swapped during each of 5 tries to embed 9 inputs with one;"):
            served.embed_texts([*"123456789"])
        assert served.stats().held == 0


def test_the_first_bad_text_of_a_list_is_told_and_nothing_stays_behind():
    policy = BatchPolicy(max_batch_size=1)
    with script(Words(), capacity=8, batching=policy) as served:
        with pytest.raises(UserError, match="worse is no number"):
            served.embed_texts(["1", "2", "worse", "4", "bad", *"56789"])
        assert served.stats().held == 0
        assert served.embed_text("3").tolist() == [3.0] * DECLARED


@pytest.mark.parametrize("one", ["123", b"123", Path("1")])
def test_one_input_where_a_list_belongs_is_not_taken_for_a_list_of_its_letters(one: Any):
    with script(Words()) as served:
        with pytest.raises(UserError, match="put it in a list, or use embed_text"):
            served.embed_texts(one)
        with pytest.raises(UserError, match="put it in a list, or use embed_image"):
            served.embed_images(one)
        assert served.stats().accepted == 0


def test_what_is_no_list_is_the_callers_error():
    with script(Words()) as served:
        with pytest.raises(UserError, match="embed_texts got a NoneType; give a list of texts"):
            served.embed_texts(None)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="embed_images got a int; give a list of images"):
            served.embed_images(5)  # type: ignore[arg-type]


def test_a_runner_may_be_left_twice():
    served = script(Words())
    with served:
        served.__exit__(None, None, None)
        with pytest.raises(RunnerClosedError):
            served.embed_text("1")


def test_a_script_that_gets_no_thread_is_told_so_and_may_try_again(monkeypatch):
    start = threading.Thread.start

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    served = script(Words())
    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(EngineFailedError, match=r"no thread for the event loop .*; raise the limit"):
        served.__enter__()
    monkeypatch.setattr(threading.Thread, "start", start)
    with served:
        assert served.embed_text("2")[0] == 2.0


def test_a_runner_that_several_threads_leave_at_once_ends_for_all_of_them():
    """As a handler of a signal in one thread and the end of a ``with`` in another do: the process hung."""
    for _ in range(10):
        served, found = script(Words()), []
        served.__enter__()
        together = threading.Barrier(3)

        def leave(served: SyncRunner = served, together: threading.Barrier = together) -> None:
            together.wait(LIMIT)
            served.__exit__(None, None, None)
            found.append(served._thread is not None and not served._thread.is_alive())  # noqa: B023

        threads = [threading.Thread(target=leave, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert found == [True] * 3


def test_a_thread_that_leaves_a_runner_last_waits_for_its_end_too():
    """It went on beside a loop that was still ending."""
    served, go = script(Words()).__enter__(), threading.Event()

    async def slow_to_end() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(LIMIT)
        while not go.is_set():
            await asyncio.sleep(0.01)

    assert served._loop is not None
    asyncio.run_coroutine_threadsafe(slow_to_end(), served._loop)
    first, last = (threading.Thread(target=served.__exit__, args=(None, None, None)) for _ in range(2))
    first.start()
    until = time.monotonic() + LIMIT
    while served._open and time.monotonic() < until:
        time.sleep(0.01)
    last.start()
    last.join(0.2)
    waits = last.is_alive()
    go.set()
    first.join(LIMIT)
    last.join(LIMIT)
    assert waits
    assert not first.is_alive()
    assert not last.is_alive()


def test_ctrl_c_while_a_script_waits_for_the_last_answers_leaves_no_engine_in_memory():
    """As in a notebook, which lives on: each such runner kept its engines and threads."""
    words = Words()
    words.gate.clear()
    engine = words.engine()
    served = SyncRunner({"text": TowerSource(engine=lambda: engine)}, RunnerConfig(warm_up=False))

    def interrupt() -> None:
        until = time.monotonic() + LIMIT
        while not served._runner.closing and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    def ask() -> None:
        with contextlib.suppress(RunnerClosedError):
            served.infer("text", {"x": np.zeros(1, np.float32)})

    caller, other = threading.Thread(target=ask), threading.Thread(target=interrupt)
    served.__enter__()
    caller.start()
    assert words.entered.wait(LIMIT)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        served.__exit__(None, None, None)
    words.gate.set()
    for thread in (caller, other, *(one for one in threading.enumerate() if "edgeglm-" in one.name)):
        thread.join(LIMIT)
    assert not engine.loaded


def test_a_forked_child_leaves_a_with_statement_with_its_own_error(repository: Path):
    code = """
import os, sys
from tests.runtime.test_sync import Words, script
with script(Words()) as served:
    if (child := os.fork()) == 0:
        sys.exit(7)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), served.embed_text("3").tolist())
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.stdout == "7 [3.0, 3.0, 3.0]\n", result.stderr


def test_a_process_that_ends_with_a_call_under_way_lets_it_come_back_first(repository: Path):
    code = """
import threading, time
from tests.runtime.test_sync import Words, script
words = Words()
served = script(words)
served.__enter__()
words.gate.clear()
for number in ("1", "2"):
    threading.Thread(target=served.embed_text, args=(number,), daemon=True).start()
    words.entered.wait(20)
threading.Thread(target=lambda: (time.sleep(0.3), words.gate.set()), daemon=True).start()
ended = served._runner._current.inference._left
served._runner._current.inference._left = lambda crew: (print("came back", flush=True), ended(crew))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=30, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "came back\n", "")


def test_a_runner_that_was_never_entered_or_is_closed_leaves_nothing_behind():
    before = threading.active_count()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        served = script(Words())
        with pytest.raises(RunnerClosedError, match="use it in a 'with' statement"):
            served.embed_texts(["1", "2"])
        with served:
            pass
        with pytest.raises(RunnerClosedError, match="use it in a 'with' statement"):
            served.embed_texts(["1", "2"])
        with pytest.raises(RunnerClosedError, match="use it in a 'with' statement"):
            served.embed_images([b"1", b"2"])
        del served
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert threading.active_count() == before


def test_what_is_left_in_the_loop_is_cancelled_when_a_script_ends():
    ended = threading.Event()
    served = script(Words())

    async def forever() -> None:
        try:
            await asyncio.sleep(1e6)
        finally:
            ended.set()

    with served:
        assert served._loop is not None
        asyncio.run_coroutine_threadsafe(forever(), served._loop)
        served.embed_text("1")
    assert ended.is_set()
    assert served._loop.is_closed()


def test_a_caller_in_another_thread_hears_that_the_runner_was_closed():
    words, heard = Words(), list[BaseException]()
    served = script(words, drain_timeout=0.05, hang_after=0.2)

    def call() -> None:
        try:
            served.embed_text("1")
        except EdgeglmError as error:
            heard.append(error)

    with served:
        words.gate.clear()
        thread = threading.Thread(target=call)
        thread.start()
        assert words.entered.wait(LIMIT)
    thread.join(LIMIT)
    words.gate.set()
    assert [type(error) for error in heard] in ([RunnerClosedError], [EngineFailedError])


def test_a_script_that_runs_in_an_event_loop_itself_is_served_and_ends():
    async def notebook() -> None:
        with script(Words()) as served:
            assert served.embed_text("2").tolist() == [2.0] * DECLARED

    asyncio.run(notebook())
