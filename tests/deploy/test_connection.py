"""A device that cannot be named or reached, or has no Python for us: what is said of it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from edgeglm.core.errors import UserError
from edgeglm.deploy.hosts import host_from_text, hosts_from_texts
from tests.deploy.helpers import only, program, reason


def test_an_unknown_host_key_is_refused(sender, device, bundle, deploy):
    device("pear")
    (sender / ".ssh/known_hosts").write_text("")
    words = reason(deploy(bundle()))
    assert "the host key of pear is not known" in words
    assert words.endswith("to known_hosts")


def test_a_changed_host_key_is_refused_and_told_from_an_unknown_one(sender, device, bundle, deploy):
    device("pear")
    known = sender / ".ssh/known_hosts"
    other = (sender / ".ssh/pear.pub").read_text().rpartition(" ")[0]
    known.write_text(f"{known.read_text().split()[0]} {other}\n")
    assert "the host key of pear has changed" in reason(deploy(bundle()))


def test_known_hosts_that_cannot_be_read_are_told_as_such(sender, device, bundle, deploy):
    device("pear")
    with (sender / ".ssh/known_hosts").open("a") as file:
        file.write("half-a-line\n")
    words = reason(deploy(bundle()))
    assert "cannot read the known hosts or the SSH configuration for pear: Invalid known hosts entry" in words


def test_a_configuration_that_checks_no_host_key_is_refused(sender, device, bundle, deploy):
    device("pear")
    with (sender / ".ssh/config").open("a") as file:
        file.write("  UserKnownHostsFile none\n")
    assert "turns the check of pear's key off" in reason(deploy(bundle()))


def test_a_user_whose_key_is_not_accepted_is_told_so(server, sender, device, bundle, deploy):
    device("pear")
    (server.folder / "authorized_keys").write_text("")
    words = reason(deploy(bundle()))
    assert "pear refused user" in words
    assert "ssh-copy-id" in words


def test_a_user_that_is_not_there_is_told_so(device, bundle, deploy):
    device("pear")
    summary = deploy(bundle(), "nobody-here@pear")
    assert "refused user 'nobody-here'" in reason(summary)


def test_a_device_that_is_off_is_told_so(sender, bundle, deploy):
    with (sender / ".ssh/config").open("a") as file:
        file.write("Host pear\n  HostName 127.0.0.1\n  Port 1\n")
    assert "cannot reach pear" in reason(deploy(bundle()), code=1)


def test_a_device_without_python_is_told_so(device, bundle, deploy, tmp_path):
    device("pear", PATH=only(tmp_path / "bin"))
    assert reason(deploy(bundle())) == "pear has no Python; install python3 3.10 or newer there"


OLD = "import sys; sys.version_info = (3, 8, 10); exec(sys.argv[1])"


def says_it_is_old(folder: Path) -> str:
    """Return a Python that takes itself for 3.8, on a device whose environment has ``OLD``."""
    return str(program(folder / "old", f'exec {sys.executable} -c "$OLD" "$5"'))


def old_pythons() -> dict[str, str]:
    """Return interpreters that are too old, by version: of the system, or beside the one that runs this."""
    versions = ("2.7", "3.6", "3.7", "3.8", "3.9")
    beside = [
        path for path in Path(sys.base_prefix).parent.glob("*/bin/python*") if path.name[6:] in versions
    ]
    found = {path.name[6:]: str(path) for path in beside}
    for version in versions:
        if (one := shutil.which(f"python{version}")) and "shims" not in one:
            found.setdefault(version, one)
    return found


def test_a_device_with_too_old_a_python_is_told_which(device, bundle, deploy, tmp_path):
    found = old_pythons()
    if not found:
        pytest.skip("NO OLD PYTHON HERE: with python2.7 or python3.8 installed this would test one")
    for version, python in found.items():
        name = f"pear-{version.replace('.', '-')}"
        device(name, PATH=only(tmp_path / version, python3=python))
        words = reason(deploy(bundle(), name))
        assert f"has Python {version}, and edgeglm needs 3.10 or newer" in words
        assert "docs/jetson.md" in words


def test_a_python_that_says_it_is_too_old_is_told_where_none_is_installed(device, bundle, deploy, tmp_path):
    python = {"python3": says_it_is_old(tmp_path), "dirname": shutil.which("dirname")}
    device("pear", PATH=only(tmp_path / "bin", **python), OLD=OLD)
    words = reason(deploy(bundle()))
    assert "pear has Python 3.8, and edgeglm needs 3.10 or newer; install one there" in words


def test_a_newer_python_beside_an_old_one_is_found(device, bundle, deploy, tmp_path):
    python = {
        "python3": says_it_is_old(tmp_path),
        "python3.12": str(program(tmp_path / "broken", "exit 127")),
        "python3.11": sys.executable,
    }
    device("pear", PATH=only(tmp_path / "bin", **python, dirname=shutil.which("dirname")), OLD=OLD)
    (one,) = deploy(bundle()).devices
    assert one.outcome == "done", one.reason


def test_a_device_whose_shell_talks_is_told_so(device, bundle, deploy, tmp_path):
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/sh", "echo Welcome", 'exec /bin/sh "$@"', shell="/bin/bash")
    device("pear", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert "Python" in reason(deploy(bundle())) or "said" in reason(deploy(bundle()))


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=x", "a b", "user@", "host:99999", "host:0", "a@b@c", "h;rm"]
)
def test_a_malformed_device_is_bad_input(text):
    with pytest.raises(UserError, match="is no device; write it as"):
        host_from_text(text)


def test_an_address_of_one_link_names_its_interface():
    found = host_from_text("anna@[fe80::1%usb0]:2222")
    assert (found.user, found.host, found.port) == ("anna", "fe80::1%usb0", 2222)


def test_a_name_that_no_device_can_have_is_not_blamed_on_the_configuration(sender, bundle, deploy):
    assert "pear..local is no name of a device" in reason(deploy(bundle(), "pear..local"))


def test_devices_are_named_once(cli):
    with pytest.raises(UserError, match="named twice"):
        hosts_from_texts(["pear", "pear"])
    assert "give a bundle and at least one device" in cli("deploy", code=2)
    assert "there is no bundle at nowhere" in cli("deploy", "nowhere", "pear", code=2)
    assert "99999 is not in the range 0<=x<=65535" in cli("deploy", "b", "pear", "--port", "99999", code=2)
