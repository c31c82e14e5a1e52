"""The supervisor: a program that ends or hangs is started again, and gets the time that its start takes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgeglm.deploy.device import supervise


@pytest.fixture
def supervised(
    tmp_path: Path, bundle: Callable[..., Path], stub: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Return a context that supervises a stand-in for the server in this process, and yields its words."""
    monkeypatch.setattr(sys, "executable", stub)
    monkeypatch.setattr(supervise, "_FIRST_PAUSE", 0.05)
    slot, state = tmp_path / "slots/a", tmp_path / "state.json"
    slot.mkdir(parents=True)

    @contextmanager
    def running(recipe: str, **record: object) -> Iterator[Callable[[Callable[..., bool]], dict[str, Any]]]:
        (slot / "bundle").symlink_to(bundle(recipe=recipe))
        (slot / "slot.json").write_text(json.dumps(record))
        supervisor = supervise.Supervisor(slot, state, host="127.0.0.1", port=0)
        thread = threading.Thread(target=supervisor.run)
        thread.start()

        def words(wanted: Callable[..., bool]) -> dict[str, Any]:
            for _ in range(600):
                found = json.loads(state.read_bytes()) if state.exists() else {}
                if found and wanted(found):
                    return dict(found)
                time.sleep(0.05)
            raise AssertionError(found)

        try:
            yield words
        finally:
            supervisor.stop()
            thread.join(30)

    return running


def test_a_program_that_loads_slowly_comes_back_when_it_was_killed(supervised, monkeypatch):
    monkeypatch.setattr(supervise, "_UNREADY_SECONDS", 0.3)
    with supervised("loads for 1.2 s") as words:
        first = words(lambda said: said["ready"])
        os.kill(first["child"], signal.SIGKILL)
        again = words(lambda said: said["ready"] and said["child"] != first["child"])
    assert (again["restarts"], again["exit"]) == (1, -signal.SIGKILL)


def test_a_program_that_never_answers_is_ended_after_its_own_time_to_start(supervised, monkeypatch):
    monkeypatch.setattr(supervise, "_START_SECONDS", 0.5)
    with supervised("never ready") as words:
        assert words(lambda said: said["restarts"] >= 2)["exit"] == -signal.SIGTERM


def test_a_deploy_that_waits_longer_gives_each_start_that_long(supervised, monkeypatch):
    monkeypatch.setattr(supervise, "_START_SECONDS", 0.1)
    with supervised("loads for 1 s", ready_seconds=60.0) as words:
        assert words(lambda said: said["ready"])["restarts"] == 0


def test_systemds_watchdog_is_fed_while_a_program_starts_again(supervised, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(supervise, "notify", told.append)
    with supervised("loads for 0.5 s") as words:
        first = words(lambda said: said["ready"])
        assert set(told) == {"READY=1\nWATCHDOG=1"}, "before it was ready once there is no watchdog"
        told.clear()
        os.kill(first["child"], signal.SIGKILL)
        words(lambda said: said["ready"] and said["child"] != first["child"])
    assert "WATCHDOG=1" in told


def test_a_server_is_started_again_once_there_is_memory_and_room_for_it(supervised, monkeypatch, tmp_path):
    replace, start = Path.replace, subprocess.Popen
    refused: list[str] = []

    def full(self: Path, target: Path) -> Path:
        if len(refused) < 2 and target.name == "state.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    def short(*words: Any, **more: Any) -> Any:
        if len(refused) < 2:
            refused.append("memory")
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return start(*words, **more)

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(subprocess, "Popen", short)
    with supervised("") as words:
        assert words(lambda said: said["ready"])["exit"] == errno.ENOMEM
    assert len(refused) == 2


def test_a_token_that_was_handed_over_goes_before_the_one_that_the_flags_name(tmp_path, monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command))
    (tmp_path / "slot.json").write_text(json.dumps({"serve_flags": ["--token-file=/etc/edgeglm/token"]}))
    handed = "/run/credentials/edgeglm.service/token"
    supervise.Supervisor(tmp_path, tmp_path / "state", host="127.0.0.1", port=1, token=handed)._started()
    assert started[0][-2:] == ["--token-file", handed]


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
