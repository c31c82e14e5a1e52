"""The user's own SSH: agent, locked keys, jump hosts; and a user who may not write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from scripts.fixtures.loopback import Device
from tests.deploy.helpers import content, reason

RELAY = """
import os, socket, sys, threading
_, host, port = sys.argv
there = socket.create_connection((host, int(port)))
def come():
    while data := there.recv(65536):
        os.write(1, data)
    os._exit(0)
threading.Thread(target=come, daemon=True).start()
while data := os.read(0, 65536):
    there.sendall(data)
"""


@pytest.fixture
def agent(require_system: Callable[[str], str], sender: Path, monkeypatch) -> Iterator[None]:
    """An agent of the sender's, empty."""
    socket = sender / "agent"
    process = subprocess.Popen([require_system("ssh-agent"), "-D", "-a", str(socket)])
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    for _ in range(100):
        if subprocess.run(["ssh-add", "-l"], capture_output=True, check=False).returncode == 1:
            break
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def add(key: Path) -> None:
    subprocess.run(["ssh-add", "-q", str(key)], check=True)


def lock(key: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-p", "-f", str(key), "-P", "", "-N", "a pass phrase"], check=True)


def without(config: Path, word: str) -> None:
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if word not in line))


def test_a_key_that_only_the_agent_has_is_enough(agent, sender, device, bundle, deploy):
    pear = device("pear")
    add(sender / ".ssh/pear")
    (sender / ".ssh/pear").unlink()
    without(sender / ".ssh/config", "Identit")
    path = bundle()
    assert deploy(path).exit_code == 0
    assert pear.answers() == content(path)


@pytest.mark.parametrize("only", ["yes", "no"])
def test_a_locked_key_that_the_agent_has_unlocked_is_used(only, agent, sender, device, bundle, deploy):
    pear = device("pear")
    add(sender / ".ssh/pear")
    lock(sender / ".ssh/pear")
    config = sender / ".ssh/config"
    config.write_text(config.read_text().replace("IdentitiesOnly yes", f"IdentitiesOnly {only}"))
    path = bundle()
    assert deploy(path).exit_code == 0
    assert pear.answers() == content(path)


def test_a_locked_key_that_nobody_has_unlocked_is_told_and_not_asked_for(sender, device, bundle, deploy):
    pear = device("pear")
    lock(sender / ".ssh/pear")
    assert "pear refused user" in reason(deploy(bundle()))
    assert not pear.root.exists()


def test_a_device_behind_a_jump_host_is_reached(sender, device, bundle, deploy):
    pear = device("pear")
    device("hop")
    config = sender / ".ssh/config"
    config.write_text(config.read_text().replace("Host pear\n", "Host pear\n  ProxyJump hop\n"))
    path = bundle()
    assert deploy(path).exit_code == 0
    assert pear.answers() == content(path)


def test_a_proxy_command_is_one_of_a_shell(sender, device, bundle, deploy):
    pear = device("pear")
    relay = sender / "a relay.py"
    relay.write_text(RELAY)
    config = sender / ".ssh/config"
    command = f"{sys.executable} '{relay}' %h %p 2>/dev/null"
    config.write_text(config.read_text().replace("Host pear\n", f"Host pear\n  ProxyCommand {command}\n"))
    path = bundle()
    (one,) = deploy(path).devices
    assert one.outcome == "done", one.reason
    assert pear.answers() == content(path)


def test_a_jump_host_that_is_reached_through_itself_is_told(sender, bundle, deploy):
    (sender / ".ssh/config").write_text("Host pear*\n  ProxyJump pear\n")
    assert "ProxyJump leads back to pear itself" in reason(deploy(bundle()))


def test_a_terminal_that_the_configuration_asks_for_changes_no_byte(sender, device, bundle, deploy):
    pear = device("pear")
    config = sender / ".ssh/config"
    config.write_text(config.read_text().replace("Host pear\n", "Host pear\n  RequestTTY force\n"))
    path = bundle()
    (one,) = deploy(path).devices
    assert one.outcome == "done", one.reason
    assert pear.answers() == content(path)


def test_a_jump_host_whose_key_is_not_known_is_refused(sender, device, bundle, deploy):
    pear = device("pear")
    device("hop")
    (sender / "nobody").touch()
    config = sender / ".ssh/config"
    text = config.read_text().replace("Host pear\n", "Host pear\n  ProxyJump hop\n")
    config.write_text(f"{text}  UserKnownHostsFile {sender / 'nobody'}\n")
    words = reason(deploy(bundle()))
    assert "the host key of pear, or of hop on the way there, is not known or has changed" in words
    assert not pear.root.exists()


def test_files_that_the_configuration_names_and_are_not_there_are_passed_over(sender, device, bundle, deploy):
    pear = device("pear")
    config, known = sender / ".ssh/config", sender / ".ssh/known_hosts"
    named = f"  IdentityFile {sender}/.ssh/absent\n  CertificateFile {sender}/.ssh/absent-cert.pub\n"
    named += f"  UserKnownHostsFile {known} ~/.ssh/known_hosts2\n"
    config.write_text(config.read_text().replace("Host pear\n", f"Host pear\n{named}"))
    path = bundle()
    assert deploy(path).exit_code == 0
    assert pear.answers() == content(path)
    known.rename(sender / ".ssh/elsewhere")
    assert "the host key of pear is not known" in reason(deploy(path)), "no other file stands in for them"
    (sender / ".ssh/elsewhere").rename(sender / ".ssh/known_hosts3")
    (sender / ".ssh/known_hosts").write_text((sender / ".ssh/known_hosts3").read_text())
    config.write_text(config.read_text().replace(f"{known} ~", f"{sender}/.ssh/absent ~"))
    assert "the host key of pear is not known" in reason(deploy(path)), "not even the default one"


def test_a_key_of_which_only_the_public_half_lies_there_is_the_agents(agent, sender, device, bundle, deploy):
    device("pear")
    device("other")
    add(sender / ".ssh/other")
    add(sender / ".ssh/pear")
    (sender / ".ssh/pear").unlink()
    assert "IdentitiesOnly yes" in (sender / ".ssh/config").read_text()
    assert deploy(bundle()).exit_code == 0


def test_a_device_that_is_known_by_another_name_is_called_so(server, sender, device, bundle, deploy):
    device("pear")
    known, config = sender / ".ssh/known_hosts", sender / ".ssh/config"
    config.write_text(config.read_text().replace("Host pear\n", "Host pear\n  HostKeyAlias orchard\n"))
    known.write_text("")
    assert reason(deploy(bundle())).endswith("which adds orchard to known_hosts")
    other = (sender / ".ssh/pear.pub").read_text().rpartition(" ")[0]
    known.write_text(f"orchard {other}\n")
    words = reason(deploy(bundle()))
    assert "the host key of pear has changed" in words
    assert "ssh-keygen -R 'orchard'" in words
    known.write_text(f"orchard {server.host_key}\n")
    assert deploy(bundle()).exit_code == 0


@pytest.fixture
def nobody(server, sender, device, require_system, tmp_path) -> Callable[[str], Path]:
    """Return a function that makes a device whose sessions have no rights, and returns its home."""

    def make(name: str) -> Path:
        made: Device = device(name)
        keys = server.folder / "authorized_keys"
        if os.getuid() == 0:  # sshd has no other user at hand: the session gives its rights up itself
            setpriv = require_system("setpriv")
            drop = f"{setpriv} --reuid 65534 --regid 65534 --clear-groups"
            made.home.mkdir(parents=True, exist_ok=True)
            command = f'command="exec {drop} /bin/sh -c \\"$SSH_ORIGINAL_COMMAND\\""'
            head, _, last = keys.read_text().rstrip("\n").rpartition("\n")
            keys.write_text(f"{head}\n{command},{last}\n".lstrip("\n"))
            for folder in (tmp_path, *tmp_path.parents):
                if folder.stat().st_uid == 0 and folder != Path("/") and not folder.stat().st_mode & 0o001:
                    folder.chmod(folder.stat().st_mode | 0o001)
        return made.home

    return make


def test_a_user_who_may_not_write_there_is_told_so_and_nothing_is_changed(
    nobody, device, bundle, deploy, options
):
    home = nobody("pear")
    closed = home / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    words = reason(deploy(bundle(), options=msgspec.structs.replace(options, root=str(closed / "edgeglm"))))
    assert "Permission denied; give that user the right to, or pass --root" in words
    assert list(closed.iterdir()) == []


def test_a_root_that_another_user_made_is_told_so_and_serves_on(nobody, device, bundle, deploy, options):
    pear = device("plum")
    good = bundle("good")
    assert deploy(good, "plum").exit_code == 0
    nobody("pear")
    before = sorted(pear.root.rglob("*"))
    mine = msgspec.structs.replace(options, root=str(pear.root))
    words = reason(deploy(bundle("other"), "pear", options=mine))
    if os.getuid() == 0:
        assert "Permission denied" in words
        assert sorted(pear.root.rglob("*")) == before
    assert pear.answers() == content(good)
