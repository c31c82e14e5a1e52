"""What a device answers may be long, and may be odd: neither is a lost connection, nor ends other devices."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from edgeglm.core.errors import UserError
from edgeglm.deploy import connection
from edgeglm.deploy.connection import Device, connected
from edgeglm.deploy.hosts import host_from_text, hosts_from_texts
from edgeglm.deploy.remote import each
from edgeglm.deploy.summary import FleetPlan

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


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("talks", "finalize on the device printed 'Welcome to this board"),
        ("says little", "is not what this edgeglm reads; have the same version on both sides"),
    ],
)
def test_a_finalize_that_prints_something_else_is_told_with_a_remedy(recipe, words, device, bundle, deploy):
    device("pear")
    (one,) = deploy(bundle(recipe=recipe)).devices
    assert (one.outcome, one.exit_code) == ("failed", 2)
    assert words in one.reason
    assert "leave --python out" in one.reason.rpartition("; ")[2]


def test_an_answer_that_nobody_foresaw_is_the_row_of_its_device_and_stops_no_other(
    device, bundle, deploy, monkeypatch
):
    trees = [device(name) for name in ("pear", "plum", "fig")]
    path = bundle()
    right = Device.answered

    async def odd(self: Device, *parts: object) -> dict[str, object]:
        answer = await right(self, *parts)  # type: ignore[arg-type]
        if str(self._host) == "pear" and "board_files" in answer:
            del answer["board_files"]
        return answer

    monkeypatch.setattr(Device, "answered", odd)
    summary = deploy(path, *(tree.name for tree in trees), plan=FleetPlan(canary=0, max_failures=3))
    assert [one.outcome for one in summary.devices] == ["failed", "done", "done"]
    reason = "KeyError: 'board_files'; this is a fault of edgeglm, report it with these words"
    assert (summary.devices[0].reason, summary.devices[0].exit_code) == (reason, 1)
    assert trees[1].answers() == trees[2].answers()


def test_a_fault_of_one_device_is_its_row_where_several_are_asked():
    async def work(host: object) -> dict[str, object]:
        if str(host) == "pear":
            raise KeyError("to")
        return {"to": "a"}

    pear, plum = asyncio.run(each(hosts_from_texts(["pear", "plum"]), work))
    assert (pear.error.partition(";")[0], pear.exit_code) == ("KeyError: 'to'", 1)
    assert (plum.answer, plum.exit_code) == ({"to": "a"}, 0)
