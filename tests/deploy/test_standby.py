"""A program that imports while another still serves: what it must not do, and that it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgeglm.deploy.device.layout import Layout
from edgeglm.deploy.device.service import service_for
from edgeglm.deploy.device.supervise import alive
from edgeglm.deploy.device.unit import supervise_command
from scripts.fixtures.colours import colour_bundle
from scripts.fixtures.loopback import stub_python

SETTINGS = {"service": "process", "host": "127.0.0.1", "port": 0, "gpu": False}


@pytest.fixture
def layout(tmp_path: Path, repository: Path):
    """Two slots with a bundle each, whose server takes half a second to end."""
    (tmp_path / "stub").mkdir()
    python = stub_python(tmp_path / "stub", repository, sys.executable)
    layout = Layout(tmp_path / "root")
    layout.make()
    for slot in ("a", "b"):
        folder = layout.slots / slot
        (folder / "environment/bin").mkdir(parents=True)
        (folder / "environment/bin/python").symlink_to(python)
        colour_bundle(folder / "bundle", **{"recipe.toml": f"# {slot} ends slowly\n".encode()})
        layout.write_record(slot, state="staged", objects=[])
    yield layout
    service_for(layout, SETTINGS).stop()


def activated(layout: Layout, slot: str, **settings: Any) -> None:
    """Switch to a slot, in a process of its own as on a device."""
    code = """
import json, sys
from pathlib import Path
from edgeglm.deploy.device.layout import Layout
from edgeglm.deploy.device.switch import activate
activate(Layout(Path(sys.argv[1])), sys.argv[2], 20.0, json.loads(sys.argv[3]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(layout.root), slot, json.dumps(settings)]
    subprocess.run(command, check=True)


def moment(layout: Layout, slot: str, what: str) -> float:
    return float((layout.slots / slot / what).read_text())


def test_a_bundle_that_comes_back_is_opened_only_when_the_running_one_has_ended(layout):
    for slot in ("a", "b"):  # neither is known to stand by: they are started after the former one
        activated(layout, slot, **SETTINGS)
    assert layout.record("a")["stands_by"]
    (layout.slots / "a" / "opened").unlink()
    activated(layout, "a")
    assert (layout.slots / "a" / "told").exists()
    assert moment(layout, "a", "opened") >= moment(layout, "b", "ended")


def test_a_bundle_of_an_edgeglm_that_cannot_stand_by_is_started_plainly(layout):
    for slot in ("a", "b"):
        activated(layout, slot, **SETTINGS)
    layout.write_record("a", stands_by=False)
    activated(layout, "a")
    assert not (layout.slots / "a" / "told").exists()
    assert layout.pointed("current") == "a"


def test_a_program_on_standby_is_gone_with_who_started_it(layout):
    state = layout.run / "state.json"
    command = supervise_command(
        str(layout.slots / "a/environment/bin/python"),
        host="127.0.0.1",
        port=0,
        state=str(state),
        standby=True,
    )
    supervisor = subprocess.Popen(command, cwd=layout.slots / "a", stdin=subprocess.PIPE)
    time.sleep(0.5)
    assert supervisor.poll() is None
    assert supervisor.stdin is not None
    supervisor.stdin.close()
    assert supervisor.wait(20) == 0
    assert not state.exists()
    assert not (layout.slots / "a" / "opened").exists()


def test_a_program_on_standby_ends_when_its_supervisor_is_ended(layout):
    command = supervise_command(
        str(layout.slots / "a/environment/bin/python"),
        host="127.0.0.1",
        port=0,
        state=str(layout.run / "state.json"),
        standby=True,
    )
    supervisor = subprocess.Popen(command, cwd=layout.slots / "a", stdin=subprocess.PIPE)
    children: list[int] = []
    for _ in range(200):
        children = [
            int(pid)
            for pid in Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
        ]
        if children:
            break
        time.sleep(0.05)
    assert children
    supervisor.terminate()
    supervisor.wait(20)
    assert supervisor.stdin is not None
    supervisor.stdin.close()
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in children):
            break
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not alive(supervisor.pid)


def test_a_server_that_nobody_tells_opens_no_bundle(tmp_path: Path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()  # which would be refused, were it opened
    command = [sys.executable, "-m", "edgeglm.cli.main", "serve", str(bundle), "--when-told"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_asyncssh_is_imported_without_a_compiler_and_left_as_it_was():
    code = """
import ctypes.util, json, subprocess
find = ctypes.util.find_library
class Refused(subprocess.Popen):
    def __init__(self, *_, **__): raise AssertionError("a process was started")
start, subprocess.Popen = subprocess.Popen, Refused
from edgeglm.deploy.ssh import asyncssh_module
ssh = asyncssh_module()
subprocess.Popen = start
from asyncssh.kex import get_default_kex_algs
import asyncssh, sys
assert None not in sys.modules.values()
same = ctypes.util.find_library is find and ssh is asyncssh_module() is asyncssh
print(json.dumps([same, *map(bytes.decode, get_default_kex_algs())]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    same, *exchanges = json.loads(done.stdout)
    assert same
    # What keeps quantum computers out comes from cryptography, and not from a library that is looked for.
    assert "mlkem768x25519-sha256" in exchanges


def test_a_supervisor_that_never_said_it_runs_is_ended_with_the_others(layout):
    activated(layout, "a", **SETTINGS)
    unheard = json.loads((layout.run / "state.json").read_bytes())["pid"]
    (layout.run / "state.json").unlink()  # as where who started it was killed at once
    activated(layout, "b")
    assert not alive(unheard)
    assert json.loads((layout.run / "state.json").read_bytes())["slot"] == "b"
