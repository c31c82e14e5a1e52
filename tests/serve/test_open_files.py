"""A process that may open few files holds fewer connections, and says so to whoever comes too many."""

from __future__ import annotations

import re
import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from edgeglm.core.errors import UserError
from edgeglm.serve.open_files import SPARE, connections_allowed
from tests.serve.asking import asked
from tests.serve.conftest import Server, running, serve_command


def _connected(server: Server, stack: ExitStack, count: int) -> list[socket.socket]:
    host, _, port = server.address.rpartition(":")
    made = [stack.enter_context(socket.create_connection((host, int(port)), 20)) for _ in range(count)]
    for connection in made:
        connection.settimeout(20)
    return made


def test_where_few_files_may_be_open_the_last_connections_are_told_so(bundles: Path, tmp_path: Path):
    command = serve_command(bundles / "colours")
    with running(tmp_path / "log", command, files="-n 256") as server, ExitStack() as stack:
        told = server.logged(lambda event: event["event"] == "fewer-connections")
        assert (told["level"], told["wanted"], told["allowed"]) == ("warning", 4096, 256 - SPARE)
        _connected(server, stack, 256 - SPARE)
        status, headers, body = asked(server, "GET", "/v2")
        assert (status, headers["retry-after"]) == (503, "1")
        assert b"holds 192 connections already; close some" in body
        assert asked(server, "GET", "/v2/health/live")[0] == 200
        # many more who say nothing: each is told, and none takes the descriptors that health needs
        more = _connected(server, stack, 100)
        for connection in more[16:]:
            assert connection.recv(100).startswith(b"HTTP/1.1 503 ")
        stack.close()
        assert _answered_again(server, 20)


def _answered_again(server: Server, seconds: float) -> bool:
    """Say whether connections that were closed make room in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if asked(server, "GET", "/v2")[0] == 200:
            return True
        time.sleep(0.05)
    return False


def test_a_soft_limit_is_raised_to_what_the_connections_take(bundles: Path, tmp_path: Path):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * 4096 + SPARE
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"this machine allows no more than {hard} open files")
    with running(tmp_path / "log", serve_command(bundles / "colours"), files="-S -n 256") as server:
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
        found = re.search(r"Max open files +(\d+)", limits)
        assert found is not None
        assert int(found[1]) == needed
        assert not [event for event in server.events() if event["event"] == "fewer-connections"]


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "allowed", "set_to"),
    [
        (1024, 1024, 4096, 1024 - SPARE, None),
        (1024, 2048, 4096, 2048 - SPARE, 2048),
        (1024, resource.RLIM_INFINITY, 4096, 4096, 2 * 4096 + SPARE),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 4096, 4096, None),
        (1024, 4096, 100, 100, None),
    ],
)
def test_limits_of_every_kind_are_reckoned_with(monkeypatch, soft, hard, wanted, allowed, set_to):
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
    assert connections_allowed(wanted) == allowed
    assert changed == ([] if set_to is None else [(set_to, hard)])


def test_where_no_connection_fits_it_is_told(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (SPARE, SPARE))
    with pytest.raises(UserError, match="allow more than 64 with 'ulimit -n'"):
        connections_allowed(10)
