from __future__ import annotations

from pathlib import Path

import pytest

from edgeglm.serve.config import ServeConfig
from edgeglm.serve.hosts import Hosts
from tests.serve.asking import asked
from tests.serve.conftest import TOKEN, running, serve_command

NAMES = ["localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000"]
ADDRESSES = ["192.0.2.7:8000", "192.0.2.7", "[2001:db8::7]:8000"]
STRANGE = ["evil.example", "evil.example:8000", "", "192.0.2.7.evil.example", "[evil", "\xff\xfe", "1.2.3"]


@pytest.mark.parametrize(
    ("settings", "known", "refused"),
    [
        ({}, NAMES, [*ADDRESSES, "board.local", *STRANGE]),
        ({"hosts": ("Board.local",)}, [*NAMES, "board.LOCAL:80"], [*ADDRESSES, *STRANGE]),
        ({"host": "0.0.0.0"}, [*NAMES, *ADDRESSES], ["board.local", *STRANGE]),
        ({"host": "0.0.0.0", "hosts": ("board.local",)}, [*NAMES, *ADDRESSES, "board.local"], STRANGE),
        ({"host": "board.local"}, [*NAMES, *ADDRESSES, "board.local:8000"], STRANGE),
        ({"host": "0.0.0.0", "token": TOKEN}, [*NAMES, *ADDRESSES, *STRANGE], []),
        (
            {"host": "0.0.0.0", "token": TOKEN, "hosts": ("board.local",)},
            [*NAMES, "board.local"],
            [*ADDRESSES, *STRANGE],
        ),
    ],
)
def test_a_server_knows_its_names(settings, known, refused):
    hosts = Hosts(ServeConfig(**settings))
    assert [name for name in known if not hosts.know(name.encode("latin-1"))] == []
    assert [name for name in refused if hosts.know(name.encode("latin-1"))] == []


def test_beyond_loopback_without_a_token_a_name_that_was_pointed_here_is_refused(
    bundles: Path, tmp_path: Path
):
    command = serve_command(bundles / "colours", "--host", "0.0.0.0", "--no-grpc")
    with running(tmp_path / "log", command) as server:
        assert asked(server, "GET", "/v2")[0] == 200  # by its address
        assert asked(server, "GET", "/v2", headers={"Host": "192.0.2.7:8000"})[0] == 200
        status, _, body = asked(server, "GET", "/v2", headers={"Host": "evil.example"})
        assert (status, b"add it with --host-name" in body) == (403, True)
