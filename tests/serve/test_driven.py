from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from edgeglm.serve.driven import Driven
from tests.serve.asking import asked_json, infer_bytes
from tests.serve.conftest import running

Ends = list[tuple[Any, BaseException | None]]


def test_a_request_without_a_task_ends_once_with_its_result_or_its_error():
    async def main() -> None:
        loop = asyncio.get_running_loop()
        ends: Ends = []

        def ended(value: Any, error: BaseException | None) -> None:
            ends.append((value, error))

        async def at_once() -> int:
            return 1

        async def waits(future: asyncio.Future[int]) -> int:
            await asyncio.sleep(0)
            rows = await asyncio.gather(asyncio.sleep(0, 2), asyncio.to_thread(lambda: 3))
            return await future + sum(rows)

        assert not Driven(at_once(), ended).waits
        assert ends == [(1, None)]
        good, bad = loop.create_future(), loop.create_future()
        first, second = Driven(waits(good), ended), Driven(waits(bad), ended)
        assert first.waits
        assert second.waits
        good.set_result(4)
        bad.set_exception(ValueError("broken"))
        while len(ends) < 3:
            await asyncio.sleep(0.001)
        assert (9, None) in ends
        assert [str(error) for _, error in ends if error] == ["broken"]
        never = loop.create_future()
        third = Driven(waits(never), ended)
        while not never._callbacks and len(ends) < 4:
            await asyncio.sleep(0.001)
        third.cancel()
        await asyncio.sleep(0.01)
        assert never.cancelled()
        assert isinstance(ends[-1][1], asyncio.CancelledError)
        assert len(ends) == 4

    asyncio.run(main())


@pytest.mark.parametrize("rows", [1, 3])
def test_a_caller_who_hangs_up_gives_its_places_back(bundles: Path, tmp_path: Path, rows: int):
    command = ["tests.serve.faults_server", str(bundles / "colours"), "8", "1.0", "100000"]
    with running(tmp_path / "log", command) as server:
        host, _, port = server.address.rpartition(":")
        text = {"name": "text", "shape": [rows], "datatype": "BYTES", "data": ["red"] * rows}
        for _ in range(2):  # the first one is with the engine, the second one waits
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(infer_bytes(server, body=json.dumps({"inputs": [text]}).encode()))
                time.sleep(0.2)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            stats = asked_json(server, "GET", "/v1/stats")["runner"]
            if not stats["held"]:
                break
            time.sleep(0.05)
        assert (stats["held"], stats["cancelled"], stats["answered"]) == (0, 2 * rows, 0)
