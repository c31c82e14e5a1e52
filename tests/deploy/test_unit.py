"""The systemd unit, read by systemd's own tools, and the service that writes it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgeglm.deploy.device import supervise, systemd
from edgeglm.deploy.device.layout import Layout
from edgeglm.deploy.device.service import ProcessService
from edgeglm.deploy.device.switch import _words
from edgeglm.deploy.device.systemd import SystemdService
from edgeglm.deploy.device.unit import (
    PROGRAM_STOP_SECONDS,
    SUPERVISOR_STOP_SECONDS,
    UNIT_NAME,
    serve_command,
    unit_text,
)
from edgeglm.deploy.device.wire import Refused
from edgeglm.deploy.options import token_file_of
from scripts.fixtures.loopback import stop
from tests.deploy.test_deploy import content
from tests.deploy.test_refusals import only, reason


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(scope: str, **changed: object) -> Path:
        python = tmp_path / "root/current/environment/bin/python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.unlink(missing_ok=True)
        python.symlink_to(sys.executable)
        values = {"host": "127.0.0.1", "port": 8000, "state": "/run/edgeglm/state.json", "gpu": False}
        path = tmp_path / scope / UNIT_NAME
        path.parent.mkdir(exist_ok=True)
        path.write_text(unit_text(scope, tmp_path / "root", **{**values, **changed}))  # type: ignore[arg-type]
        return path

    return write


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("scope", ["system", "user"])
def test_systemd_finds_nothing_to_complain_of(scope, gpu, written, require_system):
    program = require_system("systemd-analyze")
    path = written(scope, gpu=gpu, groups=["video"] if gpu else [], trust="/etc/edgeglm/trust")
    command = [program, *(["--user"] if scope == "user" else []), "verify", "--man=no", str(path)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(path.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    about_us = [line for line in done.stderr.splitlines() if UNIT_NAME in line]
    assert about_us == [], done.stderr


@pytest.mark.parametrize("scope", ["system", "user"])
def test_a_path_with_spaces_or_percents_is_read_as_it_is(scope, tmp_path, require_system):
    program = require_system("systemd-analyze")
    root = tmp_path / "a disk; of 50% and 1%n"
    python = root / "current/environment/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    path = tmp_path / UNIT_NAME
    text = unit_text(scope, root, host="127.0.0.1", port=8000, state=f"{root}/state", gpu=False,
                     trust=f"{root}/trust", token_file=f"{root}/token")  # fmt: skip
    path.write_text(text)
    command = [program, *(["--user"] if scope == "user" else []), "verify", "--man=no", str(path)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if UNIT_NAME in line] == [], done.stderr
    name = f"{tmp_path}/a disk; of 50%% and 1%%n"
    lines = text.splitlines()
    assert f'Environment="EDGEGLM_TRUST={name}/trust"' in lines
    assert any(line.startswith(f'ExecStart="{name}/current/environment/bin/python" -m') for line in lines)


def test_the_systems_unit_hands_a_token_over_and_the_users_does_not(written):
    system, user = (
        written(scope, token_file="/etc/edge glm/token").read_text() for scope in ("system", "user")
    )
    assert "LoadCredential=token:/etc/edge glm/token" in system.splitlines()
    assert "--token-file ${CREDENTIALS_DIRECTORY}/token\n" in system
    assert "token" not in user, "whoever deployed can read it: the server's own flag names it"
    assert "token" not in written("system").read_text()


def test_the_unit_may_hold_more_files_than_the_server_takes_connections(written):
    from edgeglm.serve.config import ServeConfig

    found = re.search(r"^LimitNOFILE=(\d+)$", written("system").read_text(), re.MULTILINE)
    assert found is not None
    assert int(found[1]) >= ServeConfig().max_connections + 1024


def exposure(path: Path, program: str) -> float:
    """The score of systemd-analyze security: 0 is shut, 10 is open; nothing hardened has 9.6."""
    command = [program, "security", "--offline=true", "--no-pager", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    return float(found[1])


def test_the_unit_is_hardened_by_systemds_own_measure(written, require_system):
    program = require_system("systemd-analyze")
    assert exposure(written("system"), program) <= 2.0
    assert exposure(written("system", gpu=True), program) <= 3.5


def test_the_watchdog_and_the_limits_are_there(written):
    text = written("system").read_text()
    for line in ("Type=notify", "WatchdogSec=60", "ProtectSystem=strict", "DynamicUser=yes", "MemoryMax=75%"):
        assert line in text.splitlines()
    assert "DynamicUser" not in written("user").read_text(), "only the system may make users"


def test_whoever_waits_for_a_stop_waits_longer_than_that_may_take(written):
    from edgeglm.cli.serve import command
    from edgeglm.serve.config import ServeConfig

    (option,) = (one for one in command.params if one.name == "drain_seconds")
    found = re.search(r"^TimeoutStopSec=(\d+)$", written("system").read_text(), re.MULTILINE)
    assert found is not None
    unit = float(found[1])
    assert option.default == ServeConfig().drain_timeout
    assert option.default < PROGRAM_STOP_SECONDS < SUPERVISOR_STOP_SECONDS <= unit
    assert unit < systemd._SECONDS, "systemctl stop waits for the unit"


def test_what_is_served_is_said_in_one_place():
    words = serve_command("python", host="h", port=1, flags=["--no-grpc"])
    assert words[1:] == [
        "-m", "edgeglm.cli.main", "serve", "bundle", "--host", "h", "--port", "1", "--no-grpc"
    ]  # fmt: skip


SHOWN = " ".join(f"--property={name}" for name in ("LoadState", "NeedDaemonReload", "UnitFileState"))


def test_a_user_unit_is_written_started_and_removed(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    fake = tmp_path / "bin"
    fake.mkdir()
    for program in ("systemctl", "loginctl"):
        (fake / program).write_text(f'#!/bin/sh\necho {program} "$@" >> {calls}\n')
        (fake / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    service = SystemdService(Layout(tmp_path), {"service": "user", "host": "127.0.0.1", "port": 8000})
    service.prepare()
    service.restart()
    assert service.unit == tmp_path / "config/systemd/user" / UNIT_NAME
    assert "WantedBy=default.target" in service.unit.read_text()
    service.remove()
    assert not service.unit.exists()
    assert calls.read_text().splitlines() == [
        f"systemctl --user show {UNIT_NAME} {SHOWN}",
        "systemctl --user daemon-reload",
        "loginctl enable-linger",
        f"systemctl --user enable {UNIT_NAME}",
        f"systemctl --user restart --no-block {UNIT_NAME}",
        f"systemctl --user disable --now {UNIT_NAME}",
        "systemctl --user daemon-reload",
    ]


@pytest.mark.parametrize("allowed", [True, False])
def test_a_user_whose_units_end_when_it_logs_out_is_told_so(allowed, tmp_path, monkeypatch):
    (tmp_path / "systemctl").write_text("#!/bin/sh\n")
    switched = f"touch {tmp_path}/on" if allowed else "exit 1"
    (tmp_path / "loginctl").write_text(
        f"#!/bin/sh\n[ $1 = enable-linger ] && {{ {switched}; exit; }}\n"
        f"[ -e {tmp_path}/on ] && echo Linger=yes || echo Linger=no\n"
    )
    for program in ("systemctl", "loginctl"):
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    service = SystemdService(Layout(tmp_path), {"service": "user", "host": "127.0.0.1", "port": 8000})
    if allowed:
        service.check()
    else:
        with pytest.raises(Refused, match=r"end when it logs out.*; let root do it there, or pass"):
            service.check()


def test_a_unit_that_serves_another_root_is_neither_taken_over_nor_removed(tmp_path, monkeypatch):
    for program in ("systemctl", "loginctl"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    roots = [tmp_path / "50% of a disk", tmp_path / "another"]
    for root in roots:
        root.mkdir()
    settings = {"service": "user", "host": "127.0.0.1", "port": 8000}
    mine, other = (SystemdService(Layout(root), settings) for root in roots)
    mine.prepare()
    text = mine.unit.read_text()
    with pytest.raises(Refused, match=f"serves what lies in {roots[0]}; pass --root"):
        other.check()
    other.remove()
    assert other.unit.read_text() == text
    mine.check()
    roots[0].rmdir()
    other.check()
    other.remove()
    assert not other.unit.exists(), "a root that is gone needs it no more"


TOLD = "LoadState=loaded\nUnitFileState=enabled\nNeedDaemonReload=no"


@pytest.mark.parametrize(
    ("answer", "reloads"),
    [
        (TOLD, False),
        (TOLD.replace("=no", "=yes"), True),
        (TOLD.replace("enabled", "disabled"), True),
        (TOLD.replace("loaded", "not-found"), True),
        (TOLD.replace("loaded", "masked"), True),
    ],
)
def test_a_rollback_does_not_wait_for_systemd_to_read_every_unit_for_nothing(
    answer, reloads, tmp_path, monkeypatch
):
    calls = tmp_path / "calls"
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\necho $2 >>{calls}\necho '{answer}'\n")
    (tmp_path / "loginctl").write_text("#!/bin/sh\n")
    for program in ("systemctl", "loginctl"):
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    SystemdService(Layout(tmp_path), {"service": "user", "host": "127.0.0.1", "port": 8000}).prepare()
    assert calls.read_text().split() == ["show", *(["daemon-reload", "enable"] if reloads else [])]


class Journal(ProcessService):
    """A service whose log is what journalctl printed."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def log(self, lines: int) -> list[str]:
        return self.lines[-lines:]


AT = "2026-11-27T14:39:36+0000 orin"


def test_why_a_server_did_not_start_is_told_in_its_own_words_under_systemd_too():
    found = _words(
        Journal(
            f"{AT} python[12]: error: the engine of this bundle is broken; build it again",
            f"{AT} systemd[1]: edgeglm.service: Main process exited, code=exited, status=2/INVALIDARGUMENT",
        )
    )
    assert found == ["error: the engine of this bundle is broken; build it again"]


def test_what_systemd_says_of_itself_does_not_hide_the_servers_last_words():
    systemd = [f"{AT} systemd[1]: edgeglm.service: line {number}" for number in range(9)]
    assert _words(Journal(f"{AT} python[12]: Killed: 9", *systemd, "-- Boot 1f --")) == ["Killed: 9"]


def test_the_last_words_of_the_former_server_are_not_taken_for_the_new_ones():
    older = f"{AT} python[7]: error: of the one before it"
    lines = [older, f"{AT} python[12]: stopped", f"{AT} python[11]: error: of the former"]
    assert _words(Journal(*lines), [11, 12]) == []
    assert _words(Journal(*lines, f"{AT} python[13]: error: mine"), [11, 12]) == ["error: mine"]


@pytest.fixture
def root_with_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that takes everything and is of version 252, asked by root."""
    (tmp_path / "systemctl").write_text("#!/bin/sh\necho 'systemd 252 (252.1)'\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    return tmp_path


SYSTEM = {"service": "system", "host": "127.0.0.1", "port": 8000}


@pytest.mark.parametrize("place", ["/home/anna/edgeglm", "/root/edgeglm"])
def test_what_the_systems_unit_would_not_see_is_refused(place, root_with_systemd):
    words = (
        rf"the root is {place}, and a unit of the system sees nothing below /home, .*\(ProtectHome\); put it"
    )
    with pytest.raises(Refused, match=words):
        SystemdService(Layout(Path(place)), SYSTEM).check()
    layout = Layout(Path("/srv/edgeglm"))
    with pytest.raises(Refused, match=rf"--python is {place}/bin/python"):
        SystemdService(layout, {**SYSTEM, "python": f"{place}/bin/python"}).check()
    link = root_with_systemd / "python"
    link.symlink_to(f"{place}/bin/python")
    with pytest.raises(Refused, match=rf"--python is {place}/bin/python"):
        SystemdService(layout, {**SYSTEM, "python": str(link)}).check()
    SystemdService(layout, SYSTEM).check()


@pytest.mark.parametrize("service", ["system", "user"])
@pytest.mark.parametrize("name", ["anna's", 'a "disk"', "a\\b", "a\nb"])
def test_a_root_that_systemd_runs_nothing_in_is_refused(name, service, root_with_systemd):
    with pytest.raises(Refused, match="systemd runs no program with a quote or a backslash in its path"):
        SystemdService(Layout(Path("/srv", name)), {**SYSTEM, "service": service}).check()


def test_a_systemd_that_cannot_hand_a_token_over_is_refused_one(root_with_systemd):
    service = SystemdService(Layout(Path("/srv/edgeglm")), {**SYSTEM, "token_file": "/etc/edgeglm/token"})
    service.check()
    (root_with_systemd / "systemctl").write_text("#!/bin/sh\necho 'systemd 245 (245.4)'\n")
    with pytest.raises(Refused, match="systemd 245 on the device hands no token over"):
        service.check()


@pytest.mark.parametrize("place", ["token", "/nowhere/token"])
def test_a_token_that_is_not_there_is_refused_before_anything_is_sent(place, device, bundle, deploy, options):
    pear = device("pear")
    mine = msgspec.structs.replace(options, serve_flags=("--token-file", place))
    words = reason(deploy(bundle(), options=mine))
    assert (
        f"there is no token file {place} on the device that this user can read; write the token there"
        in words
    )
    assert not list((pear.root / "objects").iterdir())


@pytest.mark.parametrize(
    ("flags", "file"),
    [
        ((), None),
        (("--no-page", "--token-file=/a=b"), "/a=b"),
        (("--token-file", "/a", "--no-page"), "/a"),
        (("--token-file=/a", "--token-file", "/b"), "/b"),
        (("--token-file",), None),
    ],
)
def test_the_token_file_is_read_from_the_servers_flags(flags, file):
    assert token_file_of(flags) == file


def test_systemd_hears_ready_and_the_watchdog_from_the_supervisor(tmp_path, repository, stub, bundle):
    import socket

    slot = tmp_path / "slots/a"
    slot.mkdir(parents=True)
    (slot / "slot.json").write_text(json.dumps({"serve_flags": ["--no-grpc"]}))
    (slot / "bundle").symlink_to(bundle())
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(20)
        command = [
            stub,
            "-m",
            "edgeglm.deploy.device.supervise",
            "--port",
            "0",
            "--state",
            str(slot / "state"),
        ]
        environment = {**os.environ, "NOTIFY_SOCKET": address}
        process = subprocess.Popen(command, cwd=slot, env=environment)
        try:
            assert listener.recv(100) == b"READY=1\nWATCHDOG=1"
            assert json.loads((slot / "state").read_bytes())["slot"] == "a"
            assert listener.recv(100) == b"READY=1\nWATCHDOG=1"
        finally:
            process.terminate()
            assert process.wait(10) == 0
    assert json.loads((slot / "state").read_bytes())["stopped"]


CRONTAB = """#!/bin/sh
case "$1" in
  -l) cat {table} 2>/dev/null || {{ echo no crontab >&2; exit 1; }} ;;
  -) cat >{table} ;;
esac
"""


@pytest.fixture
def crontab(tmp_path: Path) -> Path:
    """The table of a crontab program that keeps it in a file, below ``bin``; nobody's real one is touched."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/crontab").write_text(CRONTAB.format(table=tmp_path / "table"))
    (tmp_path / "bin/crontab").chmod(0o755)
    return tmp_path / "table"


def test_a_reboot_brings_the_server_back_where_cron_keeps_it(device, bundle, deploy, options, cli, crontab):
    crontab.write_text("0 3 * * * backup\n")
    pear = device("pear", PATH=f"{crontab.parent / 'bin'}:{os.environ['PATH']}", EDGEGLM_STRANGER="50 %")
    mine = msgspec.structs.replace(options, service="cron")
    deploy(bundle("one"), options=mine)
    two = bundle("two")
    assert deploy(two, options=mine).exit_code == 0
    backup, line = crontab.read_text().splitlines()
    assert backup == "0 3 * * * backup", "other lines stay, and ours is there once"
    assert "STRANGER" not in line
    stop(pear)  # the power goes: its processes are gone, its files as they were
    command = line.removeprefix("@reboot ").replace(r"\%", "%")
    after = subprocess.Popen(
        ["/bin/sh", "-c", command], env={"HOME": str(pear.home), "PATH": "/usr/bin:/bin"}
    )
    try:
        assert pear.answers() == content(two)
        cli("rollback", "pear")
        assert after.wait(20) is not None, "a rollback ends what cron had started"
    finally:
        after.kill()
    assert pear.answers() != content(two)
    cli("remove", "pear")
    assert crontab.read_text() == "0 3 * * * backup\n"


def test_lines_of_a_crontab_stay_as_they_are_to_the_byte(device, bundle, deploy, options, cli, crontab):
    lines = b"# caf\xe9\n0 3 * * * backup \x0c \xc2\x85\n"
    crontab.write_bytes(lines)
    device("pear", PATH=f"{crontab.parent / 'bin'}:{os.environ['PATH']}")
    (one,) = deploy(bundle(), options=msgspec.structs.replace(options, service="cron")).devices
    assert one.outcome == "done", one.reason
    assert crontab.read_bytes().startswith(lines + b"@reboot ")
    cli("remove", "pear")
    assert crontab.read_bytes() == lines


def test_another_way_of_service_ends_the_former_one(device, bundle, deploy, options, crontab):
    pear = device("pear", PATH=f"{crontab.parent / 'bin'}:{os.environ['PATH']}")
    deploy(bundle("one"), options=msgspec.structs.replace(options, service="cron"))
    former = json.loads((pear.root / "run/state.json").read_bytes())["pid"]
    two = bundle("two")
    assert deploy(two).exit_code == 0
    assert crontab.read_text() == ""
    assert not Path(f"/proc/{former}/stat").exists() or b") Z" in Path(f"/proc/{former}/stat").read_bytes()
    assert pear.answers() == content(two)


def test_cron_is_refused_in_words_where_there_is_none(device, bundle, deploy, options, tmp_path):
    path = only(tmp_path / "without", python3=sys.executable, dirname=shutil.which("dirname"))
    device("pear", PATH=path)
    (one,) = deploy(bundle(), options=msgspec.structs.replace(options, service="cron")).devices
    assert "there is no crontab on the device" in one.reason


def test_the_log_of_a_device_that_is_left_alone_stays_small(tmp_path, monkeypatch):
    log = tmp_path / "service.log"
    with log.open("ab") as writer:
        writer.write(b"x" * 1000)
        writer.flush()
        monkeypatch.setattr(supervise, "_LOG_BYTES", 1001)
        supervise.shortened(log)
        assert log.stat().st_size == 1000
        writer.write(b"yy")
        writer.flush()
        supervise.shortened(log)
        writer.write(b"after")
    assert log.read_bytes() == b"after"
    assert (tmp_path / "service.1.log").stat().st_size == 1002
