"""What the system does to a runner: signals, pauses, forks, threads, a second loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgeglm.core.errors import UserError
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.runner import Runner
from edgeglm.runtime.sync import SyncRunner
from tests.runtime.faults import (
    HANG,
    Doubler,
    doubled,
    ended,
    held,
    run,
    runner,
    sample,
    towers,
    until,
)


def test_a_second_event_loop_is_told_to_open_its_own_runner():
    async def main() -> None:
        async with runner(Doubler()) as served:

            def elsewhere() -> None:
                with pytest.raises(UserError, match="belongs to another event loop; open one in this loop"):
                    asyncio.run(doubled(served, 1))
                with pytest.raises(UserError, match="close it in that loop"):
                    asyncio.run(served.close())

            await asyncio.get_running_loop().run_in_executor(None, elsewhere)
            assert await doubled(served, 2) == 4.0

    run(main)


def test_a_runner_whose_loop_has_ended_can_still_be_closed():
    doubler, served = Doubler(), list[Runner]()
    before = threading.active_count()

    async def opened_only() -> None:
        served.append(await runner(doubler).__aenter__())
        asked = await held(doubler, served[0], 1)
        asked.cancel()
        await ended(asked)

    async def close() -> None:
        await served[0].close()
        await served[0].close()

    asyncio.run(opened_only())
    asyncio.run(close())
    doubler.gate.set()
    run(lambda: until(lambda: threading.active_count() == before))
    assert not doubler.made[0].loaded
    assert served[0].closing


@pytest.mark.parametrize("number", ["TERM", None, 9999])
def test_what_is_no_signal_is_refused(number: Any):
    async def main() -> None:
        async with runner(Doubler()) as served:
            with pytest.raises(UserError, match="is no signal; give one, such as"):
                served.close_on(number)

    run(main)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_signal_that_no_process_hears_is_refused_in_words(number: signal.Signals):
    async def main() -> None:
        async with runner(Doubler()) as served:
            with pytest.raises(UserError, match=r"no process hears .*; give another signal, such as"):
                served.close_on(number)

    run(main)


def test_a_thread_without_a_loop_is_told_to_ask_in_the_runners_own():
    async def main() -> None:
        async with runner(Doubler()) as served:
            with pytest.raises(UserError, match="no event loop runs in this thread"):
                await asyncio.to_thread(lambda: served.contracts)

    run(main)


def test_threads_share_batches_through_the_blocking_runner():
    doubler = Doubler()
    answers: dict[int, float] = {}
    with SyncRunner(towers(doubler), RunnerConfig(warm_up=False)) as served:
        doubler.gate.clear()

        def call(value: int) -> None:
            answers[value] = float(served.infer("double", sample(value))["y"][0])

        threads = [threading.Thread(target=call, args=(value,)) for value in range(8)]
        for thread in threads:
            thread.start()
        assert doubler.entered.wait(5)
        asyncio.run(until(lambda: served.stats().held == 8))
        doubler.gate.set()
        for thread in threads:
            thread.join()
    assert answers == {value: 2.0 * value for value in range(8)}
    assert len(doubler.batches) <= 3


_SIGTERM = """
import asyncio, signal
from tests.runtime.faults import Doubler, doubled, runner, ended
from edgeglm.runtime.requests import RunnerClosedError

async def main():
    doubler = Doubler(seconds=0.3)
    async with runner(doubler) as served:
        served.close_on(signal.SIGTERM)
        accepted = [asyncio.create_task(doubled(served, value)) for value in range(40)]
        await asyncio.sleep(0.05)
        print("ready", flush=True)
        while not served.closing:
            await asyncio.sleep(0.01)
        late = await ended(doubled(served, 1))
        assert isinstance(late[0], RunnerClosedError), late
        answers = await asyncio.gather(*accepted)
    print(answers == [2.0 * value for value in range(40)], flush=True)

asyncio.run(main())
"""

_PAUSED = """
import asyncio, time
from tests.runtime.faults import Doubler, doubled, run, runner, until

class Busy(Doubler):
    def function(self, feeds, engine):
        self.entered.set()
        while time.thread_time() < 0.3:
            pass
        return super().function(feeds, engine)

async def main():
    doubler = Busy()
    async with runner(doubler, hang_after=1.5) as served:
        asked = asyncio.create_task(doubled(served, 1))
        await until(doubler.entered.is_set)
        print("called", flush=True)
        print(await asked, served.stats().replaced, flush=True)

run(main)
"""

_FORK = """
import asyncio, os
from tests.runtime.faults import Doubler, doubled, runner, sample, towers
from edgeglm.core.errors import UserError
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.sync import SyncRunner

async def child_asks(served):
    try:
        await doubled(served, 1)
    except UserError as error:
        assert "before a fork" in str(error), error
        await served.close()
        os._exit(0)
    os._exit(1)

async def main():
    async with runner(Doubler()) as served:
        await doubled(served, 1)
        if (child := os.fork()) == 0:
            await child_asks(served)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert await doubled(served, 2) == 4.0

asyncio.run(main())
with SyncRunner(towers(Doubler()), RunnerConfig(warm_up=False)) as served:
    if (child := os.fork()) == 0:
        try:
            served.infer("double", sample(1))
        except UserError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert served.infer("double", sample(2))["y"][0] == 4
print("parent answered")
"""

_HUNG_EXIT = """
import asyncio
from tests.runtime.faults import HANG, Doubler, doubled, ended, runner

async def main():
    async with runner(Doubler(), hang_after=0.1) as served:
        print(await ended(doubled(served, HANG)))

asyncio.run(main())
"""


def test_sigterm_in_the_middle_of_a_batch_still_answers_what_was_accepted(repository: Path):
    with subprocess.Popen(
        [sys.executable, "-c", _SIGTERM], cwd=repository, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "True\n"
        assert process.wait(20) == 0


def test_a_call_during_which_the_process_was_paused_is_not_taken_for_a_hung_one(repository: Path):
    with subprocess.Popen(
        [sys.executable, "-c", _PAUSED], cwd=repository, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "called\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "2.0 0\n"
        assert process.wait(20) == 0


def test_a_closed_runner_puts_the_former_handler_of_a_signal_back():
    def mine(*_: object) -> None:
        """Do nothing."""

    async def main() -> None:
        async with runner(Doubler()) as served:
            served.close_on(signal.SIGUSR1, signal.SIGUSR2)
            served.close_on(signal.SIGUSR1)
            assert signal.getsignal(signal.SIGUSR1) is not mine

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        run(main)
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_loop_that_ends_before_its_runner_is_closed_does_not_lose_the_former_handler():
    """Whoever stopped the process later met the default, which kills, in place of the script's own."""

    def mine(*_: object) -> None:
        """Do nothing."""

    def theirs(*_: object) -> None:
        """Do nothing."""

    served: list[Runner] = []

    async def opened_only() -> None:
        served.append(await runner(Doubler()).__aenter__())
        served[0].close_on(signal.SIGUSR1, signal.SIGUSR2)

    before = {number: signal.signal(number, mine) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        asyncio.run(opened_only())
        signal.signal(signal.SIGUSR2, theirs)
        asyncio.run(served[0].close())
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert signal.getsignal(signal.SIGUSR2) is theirs
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_runners_that_share_a_loop_all_close_at_one_signal_and_none_takes_it_from_the_others():
    async def main() -> None:
        first, second, third = (runner(Doubler()) for _ in range(3))
        async with first, second, third:
            for served in (first, second, third):
                served.close_on(signal.SIGUSR1)
            await first.close()  # whose former handler is not the signal's: others still hear it
            os.kill(os.getpid(), signal.SIGUSR1)
            await until(lambda: second.closing and third.closing)

    def mine(*_: object) -> None:
        """Do nothing."""

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        run(main)
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_where_no_signals_can_be_watched_for_the_caller_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        async with runner(Doubler()) as served:
            with pytest.raises(UserError, match=r"main thread of a Unix process, or call close yourself"):
                served.close_on(signal.SIGTERM)
            assert await doubled(served, 2) == 4.0

    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(20)
    assert errors == []

    def refused(*_: object) -> None:
        raise NotImplementedError  # as loops on Windows do

    monkeypatch.setattr(asyncio.SelectorEventLoop, "add_signal_handler", refused)
    run(main)


def test_a_forked_child_is_told_instead_of_waiting_for_threads_it_does_not_have(repository: Path):
    result = subprocess.run(
        [sys.executable, "-c", _FORK], cwd=repository, capture_output=True, text=True, timeout=30, check=False
    )
    assert result.stdout == "parent answered\n", result.stderr


_FORK_UNDER_A_LOCK = """
import asyncio, os, signal
from tests.runtime.faults import Doubler, doubled, runner
from edgeglm.core.errors import UserError

async def main():
    async with runner(Doubler()) as served:
        await doubled(served, 1)
        child = os.fork()
        if child == 0:
            served._current.inference._lock.acquire()  # as a worker may have held it in that moment
            signal.alarm(10)
            for books in (served.stats, served.times):
                try:
                    books()
                except UserError as error:
                    assert "before a fork" in str(error), error
                else:
                    os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(served.stats().answered)

asyncio.run(main())
"""


def test_the_books_of_a_runner_do_not_hang_in_a_forked_child(repository: Path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK_UNDER_A_LOCK],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.stdout == "1\n", result.stderr


def test_a_call_that_hangs_for_ever_does_not_keep_the_process_alive(repository: Path):
    result = subprocess.run(
        [sys.executable, "-c", _HUNG_EXIT], cwd=repository, capture_output=True, text=True, timeout=15
    )
    assert result.returncode == 0, result.stderr
    assert "did not return within 0.1 s" in result.stdout


def test_the_watchdog_sleeps_when_nothing_is_asked():
    doubler = Doubler()

    async def main() -> None:
        async with runner(doubler, hang_after=0.4) as served:
            await doubled(served, 1)
            await until(lambda: served._watchdog is None)
            with pytest.raises(Exception, match="did not return"):
                await doubled(served, HANG)
            doubler.released.set()

    run(main)
