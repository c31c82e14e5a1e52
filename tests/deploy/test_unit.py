"""The systemd unit, read by systemd's own tools, and the service that writes it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeglm.deploy.device import systemd
from edgeglm.deploy.device.unit import (
    PROGRAM_STOP_SECONDS,
    SUPERVISOR_STOP_SECONDS,
    UNIT_NAME,
    serve_command,
    unit_text,
)


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
