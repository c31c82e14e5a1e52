"""What workers tell the event loop must arrive: once, in order, and whatever else goes wrong."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from edgeglm.runtime.mailbox import Mailbox


class Unwatchful(asyncio.SelectorEventLoop):
    """A loop that watches no files, as the one of Windows."""

    def add_reader(self, *_: Any) -> None:  # type: ignore[override]  # never called to any end
        raise NotImplementedError


@pytest.fixture(params=[asyncio.SelectorEventLoop, Unwatchful])
def loop(request):
    made = request.param()
    yield made
    made.close()


def test_what_many_threads_post_arrives_once_and_in_each_threads_order(loop):
    async def main() -> None:
        mailbox = Mailbox(loop)
        arrived: list[tuple[int, int]] = []
        everything = loop.create_future()

        def take(thread: int, number: int) -> None:
            assert threading.current_thread() is threading.main_thread()
            arrived.append((thread, number))
            if len(arrived) == 4 * 500:
                everything.set_result(None)

        def post(thread: int) -> None:
            for number in range(500):
                mailbox.post(take, thread, number)

        threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(everything, 20)
        for thread in threads:
            thread.join()
        mailbox.close()
        for owner in range(4):
            assert [number for thread, number in arrived if thread == owner] == list(range(500))

    loop.run_until_complete(main())


def test_an_error_in_one_letter_is_reported_and_the_next_is_read(loop):
    async def main() -> None:
        reports: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, report: reports.append(report))
        mailbox, read = Mailbox(loop), loop.create_future()

        def fail() -> None:
            raise ValueError("torn")

        mailbox.post(fail)
        mailbox.post(read.set_result, "second")
        assert await asyncio.wait_for(read, 20) == "second"
        assert [str(report["exception"]) for report in reports] == ["torn"]
        mailbox.close()

    loop.run_until_complete(main())


def test_close_reads_what_was_posted_and_takes_nothing_more(loop):
    async def main() -> None:
        mailbox = Mailbox(loop)
        read: list[str] = []
        mailbox.post(read.append, "before")
        mailbox.close()
        mailbox.close()
        mailbox.post(read.append, "after")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert read == ["before"]

    loop.run_until_complete(main())


def test_a_worker_that_outlives_its_loop_may_still_post():
    loop = Unwatchful()
    mailbox = Mailbox(loop)
    loop.close()
    mailbox.post(lambda: None)


def test_a_process_without_a_file_to_spare_is_served_all_the_same(monkeypatch):
    def refused(*_: Any) -> int:
        raise OSError(24, "Too many open files")

    async def main() -> None:
        monkeypatch.setattr("edgeglm.runtime.mailbox._Bell", refused)
        mailbox, read = Mailbox(asyncio.get_running_loop()), asyncio.Event()
        mailbox.post(read.set)
        await asyncio.wait_for(read.wait(), 20)
        mailbox.close()

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="counts files in /proc")
def test_mailboxes_leave_no_files_open():
    loop = asyncio.SelectorEventLoop()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        Mailbox(loop).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    loop.close()


@pytest.mark.parametrize("bell", ["ring", "ring_idle"])
def test_what_is_put_in_without_a_sound_waits_for_the_bell(loop, bell):
    async def main() -> None:
        mailbox = Mailbox(loop)
        read: list[int] = []
        mailbox.put(read.append, 1)
        await asyncio.sleep(0.01)
        assert read == []
        mailbox.put(read.append, 2)
        getattr(mailbox, bell)()
        getattr(mailbox, bell)()
        while len(read) < 2:
            await asyncio.sleep(0.001)
        assert read == [1, 2]
        mailbox.close()

    loop.run_until_complete(asyncio.wait_for(main(), 20))
