"""Under a real systemd: the unit's user and watchdog, a rollback, and a bundle that never gets ready."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from scripts.fixtures.loopback import Server, sshd, stub_python
from tests.deploy.booted import Booted, booted
from tests.deploy.helpers import content, real_bundle, reason
from tests.skips import loud_skip

pytestmark = [pytest.mark.slow, pytest.mark.system]
ROOT = "/srv/devices/edgeglm"
UNIT = "edgeglm.service"
PYTHON = """#!/bin/sh
export LD_LIBRARY_PATH=/srv/python/lib PYTHONPATH=/srv/repository:/srv/packages
exec /srv/python/bin/python{version} "$@"
"""


@pytest.fixture
def systemd(require_system: Callable[[str], str], tmp_path: Path, repository: Path) -> Iterator[Booted]:
    """A systemd whose /srv holds this Python, this checkout, and a stand-in for edgeglm's commands."""
    if os.getuid() != 0:
        pytest.skip(
            "NOT ALLOWED HERE, nor by a CI that is not root: a systemd of its own; nothing was tested"
        )
    for program in ("unshare", "nsenter", "systemctl"):
        require_system(program)
    manager = Path("/usr/lib/systemd/systemd")
    if not manager.exists():
        loud_skip("NOT INSTALLED: systemd; nothing was tested")
    srv = tmp_path / "srv"
    for name in ("devices", "stub", "bin"):
        (srv / name).mkdir(parents=True)
    stub_python(srv / "stub", Path("/srv/repository"), "/usr/bin/python3")
    for path in (srv / "stub").iterdir():
        path.write_text(path.read_text().replace(str(srv), "/srv"))
    (srv / "bin/python").write_text(PYTHON.format(version="{}.{}".format(*sys.version_info)))
    (srv / "bin/python").chmod(0o755)
    binds = {
        "python": Path(sys.base_prefix),
        "packages": Path(msgspec.__file__).parent.parent,
        "repository": repository,
    }
    with booted(tmp_path / "systemd", srv, binds, str(manager)) as running:
        yield running


@pytest.fixture
def server(systemd: Booted, require_system: Callable[[str], str], tmp_path: Path) -> Iterator[Server]:
    """An SSH server in there."""
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin"
    inside = tmp_path / "sshd-inside"
    words = " ".join([*systemd.enter, require_system("sshd")])
    inside.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    inside.chmod(0o755)
    (tmp_path / "sshd").mkdir()
    with sshd(str(inside), tmp_path / "sshd") as running:
        yield running


@pytest.fixture
def mine(options):
    return msgspec.structs.replace(
        options, service="auto", python="/srv/stub/python", root=ROOT, ready_seconds=30.0
    )


def state(systemd: Booted, runtime: str = "/run") -> dict[str, object]:
    found: dict[str, object] = json.loads((systemd.files / f".{runtime}/edgeglm/state.json").read_bytes())
    return found


def answer(systemd: Booted, runtime: str = "/run") -> str:
    for _ in range(200):
        try:
            said = state(systemd, runtime)
            with urllib.request.urlopen(f"http://127.0.0.1:{said['port']}/", timeout=5) as found:
                return str(found.read().decode())
        except (OSError, KeyError, ValueError):
            time.sleep(0.05)
    raise AssertionError(systemd.run("systemctl", "status", "--no-pager", UNIT))


def show(systemd: Booted, name: str) -> str:
    return systemd.run("systemctl", "show", "--value", "-p", name, UNIT)


def test_the_real_server_runs_in_the_hardened_unit_as_nobody_that_exists(
    systemd, device, deploy, mine, tmp_path, cli
):
    device("pear")
    real = msgspec.structs.replace(mine, python="/srv/bin/python", ready_seconds=90.0, rounds=7)
    (one,) = deploy(real_bundle(tmp_path / "real"), options=real).devices
    assert one.outcome == "done", (one.reason, cli("logs", "pear", "--root", ROOT))
    assert (show(systemd, "ActiveState"), show(systemd, "SubState")) == ("active", "running")
    assert show(systemd, "Type") == "notify"
    assert show(systemd, "UnitFileState") == "enabled"
    main = int(show(systemd, "MainPID"))
    status = systemd.run("cat", f"/proc/{main}/status")
    assert "NoNewPrivs:\t1" in status
    assert int(status.split("Uid:")[1].split()[0]) > 60_000, "a user that exists only while it runs"
    assert "CapEff:\t0000000000000000" in status
    request = f"{one.delivered.url}/v2/health/ready"
    with urllib.request.urlopen(request, timeout=5) as found:
        assert found.status == 200
    told = "\n".join(json.loads(cli("logs", "pear", "--json"))["lines"])
    assert "/v2/health/ready" in told, "what the server itself writes is in the journal"
    cli("remove", "pear")
    assert show(systemd, "LoadState") == "not-found"
    assert not (systemd.files / "etc/systemd/system" / UNIT).exists()


def test_a_token_that_only_root_may_read_is_handed_to_the_servers_own_user(
    systemd, device, deploy, mine, tmp_path, cli
):
    device("pear")
    words = "a token of twenty letters"
    token = systemd.files / "srv/a token"
    token.write_text(words)
    token.chmod(0o600)
    real = msgspec.structs.replace(
        mine,
        python="/srv/bin/python",
        ready_seconds=90.0,
        rounds=7,
        serve_flags=("--token-file=/srv/a token",),
    )
    (one,) = deploy(real_bundle(tmp_path / "real"), options=real).devices
    assert one.outcome == "done", (one.reason, cli("logs", "pear", "--root", ROOT))
    request = urllib.request.Request(f"{one.delivered.url}/v2/models/stats")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=5)
    request.add_header("Authorization", f"Bearer {words}")
    with urllib.request.urlopen(request, timeout=5) as found:
        assert found.status == 200


def test_a_bundle_that_never_gets_ready_is_taken_back_by_systemd_too(
    systemd, device, bundle, deploy, mine, cli
):
    device("pear")
    good, better = bundle("good"), bundle("better")
    assert deploy(good, options=mine).exit_code == 0
    assert answer(systemd) == content(good)
    slow = msgspec.structs.replace(mine, ready_seconds=3.0)
    for recipe in ("never ready", "dies"):
        words = reason(deploy(bundle("bad", recipe=recipe), options=slow), code=3)
        assert "the former one serves again" in words
        assert answer(systemd) == content(good)
    assert deploy(better, options=mine).exit_code == 0
    assert answer(systemd) == content(better)
    cli("rollback", "pear")
    assert answer(systemd) == content(good)
    assert show(systemd, "NRestarts") == "0"


def test_another_service_and_back_leave_one_server_and_no_unit(systemd, device, bundle, deploy, mine):
    device("pear")
    one, two = bundle("one"), bundle("two")
    assert deploy(one, options=mine).exit_code == 0
    process = msgspec.structs.replace(mine, service="process")
    assert deploy(two, options=process).exit_code == 0
    assert show(systemd, "LoadState") == "not-found"
    there = json.loads((systemd.files / f".{ROOT}/run/state.json").read_bytes())
    with urllib.request.urlopen(f"http://127.0.0.1:{there['port']}/", timeout=5) as found:
        assert found.read().decode() == content(two)
    broken = bundle("broken", recipe="dies")
    words = reason(deploy(broken, options=mine), code=3)
    assert "the former one serves again" in words
    assert show(systemd, "LoadState") == "not-found"
    assert deploy(one, options=mine).exit_code == 0
    assert answer(systemd) == content(one)
    assert not (systemd.files / f".{ROOT}/run/state.json").exists()


def test_a_server_that_hangs_is_ended_by_the_watchdog_and_started_again(
    systemd, device, bundle, deploy, mine, cli
):
    device("pear")
    path = bundle()
    assert deploy(path, options=mine).exit_code == 0
    drop_in = systemd.files / "etc/systemd/system" / f"{UNIT}.d"
    drop_in.mkdir()
    (drop_in / "quick.conf").write_text("[Service]\nWatchdogSec=7\n")
    systemd.run("systemctl", "daemon-reload")
    systemd.run("systemctl", "restart", UNIT)
    assert answer(systemd) == content(path)
    before = show(systemd, "MainPID")
    child = systemd.run("pgrep", "-P", before).split()[0]
    systemd.run("kill", f"-{signal.SIGSTOP.value}", child)
    for _ in range(600):
        if show(systemd, "NRestarts") == "1":
            break
        time.sleep(0.1)
    assert show(systemd, "MainPID") != before
    assert answer(systemd) == content(path)
    assert "watchdog timeout" in "\n".join(json.loads(cli("logs", "pear", "--json"))["lines"]).lower()


def test_a_unit_of_a_users_own_systemd_serves_and_goes(systemd, device, bundle, deploy, mine, cli):
    pear = device("pear", XDG_RUNTIME_DIR="/run/user/0")
    systemd.run("systemd-run", "--unit=user-manager", "--setenv=XDG_RUNTIME_DIR=/run/user/0",
                f"--setenv=HOME={pear.home}", "-p", "Delegate=yes", "/usr/lib/systemd/systemd", "--user",
                "--unit=default.target")  # fmt: skip
    user = msgspec.structs.replace(mine, service="user")
    one, two = bundle("one"), bundle("two")
    (first,) = deploy(one, options=user).devices
    assert first.outcome == "done", (first.reason, systemd.run("journalctl", "--no-pager"))
    assert answer(systemd, "/run/user/0") == content(one)
    assert deploy(two, options=user).exit_code == 0
    cli("rollback", "pear")
    assert answer(systemd, "/run/user/0") == content(one)
    cli("remove", "pear")
    assert not (systemd.files / f".{ROOT}").exists()
