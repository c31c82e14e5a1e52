"""What a device answers may be long, and may be odd: neither is a lost connection, nor ends other devices."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from edgeglm.core.errors import UserError
from edgeglm.deploy import connection
from edgeglm.deploy.connection import connected
from edgeglm.deploy.hosts import host_from_text

MEGABYTE = 1_000_000


def test_answers_of_many_megabytes_come_through(device, bundle, deploy, cli):
    pear = device("pear")
    assert deploy(bundle()).exit_code == 0
    engines = pear.root / "slots/a/bundle.finalized/engines"
    contents = [os.urandom(3 * MEGABYTE) for _ in range(4)]
    for number, data in enumerate(contents):
        (engines / str(number)).mkdir()
        (engines / str(number) / "timing.cache").write_bytes(data)

    async def read() -> dict[str, object]:
        async with connected(host_from_text("pear")) as talk:
            await talk.ask("lock", owner="a", seconds=5)
            patterns = ["bundle.finalized/engines/[0-3]/timing.cache"]
            return await talk.ask("read", slot="a", patterns=patterns, limit=32 << 20)

    import base64

    files = asyncio.run(read())["files"]
    assert isinstance(files, dict)
    assert [base64.b64decode(data) for data in files.values()] == contents
    lines = [f"{number} {'x' * 50}" for number in range(100_000)]
    (pear.root / "run/service.log").write_text("\n".join(lines))
    assert json.loads(cli("logs", "pear", "-n", 100_000, "--json"))["lines"] == lines


def test_a_bundle_whose_evidence_is_large_is_deployed(device, bundle, deploy):
    device("pear")
    path = bundle(recipe="evidence of 3000000 bytes")
    (one,) = deploy(path).devices
    assert one.outcome == "done", one.reason


def test_an_answer_beyond_all_bounds_is_refused(device, bundle, deploy, cli, monkeypatch):
    device("pear")
    deploy(bundle())
    monkeypatch.setattr(connection, "_LONGEST_ANSWER", 100)

    async def ask() -> None:
        async with connected(host_from_text("pear")) as talk:
            await talk.ask("facts")

    with pytest.raises(UserError, match="pear answered with more than 0 MiB; look at"):
        asyncio.run(ask())
