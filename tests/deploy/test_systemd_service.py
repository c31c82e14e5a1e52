"""The service that writes the unit: what it asks systemd to do, refuses, and tells of its log."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeglm.deploy.device.layout import Layout
from edgeglm.deploy.device.service import ProcessService
from edgeglm.deploy.device.switch import _words
from edgeglm.deploy.device.systemd import SystemdService
from edgeglm.deploy.device.unit import UNIT_NAME
from edgeglm.deploy.device.wire import Refused
from tests.deploy.helpers import program

USER = {"service": "user", "host": "127.0.0.1", "port": 8000}
SYSTEM = {**USER, "service": "system"}
SHOWN = " ".join(f"--property={name}" for name in ("LoadState", "NeedDaemonReload", "UnitFileState"))


def test_a_user_unit_is_written_started_and_removed(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("systemctl", "loginctl"):
        program(fake / name, f'echo {name} "$@" >> {calls}')
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    service = SystemdService(Layout(tmp_path), USER)
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
    program(tmp_path / "systemctl")
    switched = f"touch {tmp_path}/on" if allowed else "exit 1"
    program(
        tmp_path / "loginctl",
        f"[ $1 = enable-linger ] && {{ {switched}; exit; }}",
        f"[ -e {tmp_path}/on ] && echo Linger=yes || echo Linger=no",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    service = SystemdService(Layout(tmp_path), USER)
    if allowed:
        service.check()
    else:
        with pytest.raises(Refused, match=r"end when it logs out.*; let root do it there, or pass"):
            service.check()


def test_a_unit_that_serves_another_root_is_neither_taken_over_nor_removed(tmp_path, monkeypatch):
    for name in ("systemctl", "loginctl"):
        program(tmp_path / name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    roots = [tmp_path / "50% of a disk", tmp_path / "another"]
    for root in roots:
        root.mkdir()
    mine, other = (SystemdService(Layout(root), USER) for root in roots)
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
    program(tmp_path / "systemctl", f"echo $2 >>{calls}", f"echo '{answer}'")
    program(tmp_path / "loginctl")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    SystemdService(Layout(tmp_path), USER).prepare()
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
    program(tmp_path / "systemctl", "echo 'systemd 252 (252.1)'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    return tmp_path


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
    program(root_with_systemd / "systemctl", "echo 'systemd 245 (245.4)'")
    with pytest.raises(Refused, match="systemd 245 on the device hands no token over"):
        service.check()


def test_a_systemctl_that_hangs_is_told_as_such(tmp_path, monkeypatch):
    program(tmp_path / "systemctl", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("edgeglm.deploy.device.systemd._SECONDS", 0.2)
    service = SystemdService(Layout(tmp_path), USER)
    with pytest.raises(Refused, match=r"timed out .*; mend it, or pass --service process"):
        service.check()
