"""The device's side is kept there and does not travel again; what is not it, or not safe, is never run."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeglm.deploy.agent_source import agent_source
from edgeglm.deploy.connection import connected
from edgeglm.deploy.hosts import host_from_text
from scripts.fixtures.loopback import Device
from scripts.fixtures.proxy import cable
from tests.deploy.helpers import content

DIGEST = hashlib.sha256(agent_source()).hexdigest()
FEW = 4_000
"""Bytes: a deploy that moves no file asks its questions in fewer; the device's side is 25 kB."""


@pytest.fixture
def pear(device, bundle, deploy) -> Device:
    """A device that was deployed to."""
    made: Device = device("pear")
    assert deploy(bundle()).exit_code == 0
    return made


@pytest.fixture
def sent(pear: Device, bundle: Callable[..., Path], deploy) -> Callable[[], int]:
    """Return a function that deploys again and tells what that sent."""

    def again() -> int:
        (one,) = deploy(bundle()).devices
        assert one.outcome == "done", one.reason
        return int(one.delivered.sent_bytes)

    return again


def place(pear: Device) -> Path:
    return pear.root / "agent" / DIGEST


def test_a_device_that_has_it_is_not_sent_it_again(pear, sent):
    assert place(pear).read_bytes() == agent_source()
    assert (place(pear).stat().st_mode & 0o777, place(pear).parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert sent() < FEW


def test_it_is_found_by_who_does_not_know_the_device_and_names_no_root(pear):
    async def ask() -> int:
        async with connected(host_from_text("pear")) as talk:
            await talk.ask("facts")
            return talk.sent_bytes

    assert asyncio.run(ask()) < 200


def test_asking_a_device_that_has_none_leaves_none_there(device, cli):
    pear = device("pear")
    cli("rollback", "pear", code=2)
    assert not pear.root.exists()


def test_what_was_altered_is_not_run_and_is_replaced(pear, sent, tmp_path):
    sources = json.loads(zlib.decompress(agent_source()))
    sources["edgeglm.deploy.device.agent"] = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    place(pear).write_bytes(zlib.compress(json.dumps(sources).encode()))
    assert sent() > len(agent_source())
    assert not (tmp_path / "ran").exists()
    assert place(pear).read_bytes() == agent_source()
    assert sent() < FEW


def test_that_of_another_version_makes_room(pear, sent):
    place(pear).rename(place(pear).with_name("0" * 64))
    assert sent() > len(agent_source())
    assert [path.name for path in place(pear).parent.iterdir()] == [DIGEST]


@pytest.mark.parametrize(
    ("which", "mode"), [("file", 0o620), ("file", 0o602), ("folder", 0o770), ("folder", 0o707)]
)
def test_where_another_user_could_write_nothing_is_run_from(which, mode, pear, sent):
    (place(pear) if which == "file" else place(pear).parent).chmod(mode)
    assert sent() > len(agent_source())
    assert place(pear).parent.stat().st_mode & 0o777 == 0o700
    assert sent() < FEW


@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_another_user_owns_is_not_run(which, pear, sent):
    if os.getuid() != 0:
        pytest.skip("only root may give a file to another user")
    os.chown(place(pear) if which == "file" else place(pear).parent, 12345, 12345)
    assert sent() > len(agent_source())
    assert {path.stat().st_uid for path in (place(pear), place(pear).parent)} == {0}


@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_link_to_it_is_not_followed_and_what_it_leads_to_stays(which, pear, sent, tmp_path):
    linked = place(pear) if which == "file" else place(pear).parent
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    assert sent() > len(agent_source())
    assert not linked.is_symlink()
    assert (tmp_path / "elsewhere").exists()


def test_a_part_of_it_is_not_run_and_is_replaced(pear, sent):
    place(pear).write_bytes(agent_source()[:9_000])
    assert sent() > len(agent_source())
    assert place(pear).read_bytes() == agent_source()


def test_a_connection_that_ends_while_it_travels_leaves_nothing_and_is_told(server, device, bundle, deploy):
    with cable(server.port) as way:
        pear = device("pear", port=way.port)
        way.limit = 22_000  # the keys take 8,000, the device's side 25,000
        (one,) = deploy(bundle()).devices
        assert "run the same command again" in one.reason
        assert not pear.root.exists()
        way.limit = None
        assert deploy(bundle()).exit_code == 0
        assert place(pear).read_bytes() == agent_source()


def test_a_file_in_its_place_is_no_hindrance(pear, sent, bundle):
    place(pear).unlink()
    place(pear).parent.rmdir()
    place(pear).parent.write_text("no folder")
    sent()
    assert sent() < FEW
    assert pear.answers() == content(bundle())
