"""Nothing secret on a command line, in a log, in a summary, or in what is left on either side."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path

import msgspec
import pytest

from scripts.fixtures.loopback import sshd
from scripts.fixtures.watcher import files_with, watcher
from tests.deploy.helpers import real_bundle

pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture
def server(require_system, tmp_path):
    """A server of its own that logs what it does; what its own debug level tells is not ours."""
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin"
    (tmp_path / "sshd").mkdir()
    with sshd(require_system("sshd"), tmp_path / "sshd", log_level="VERBOSE") as running:
        yield running


def test_nothing_secret_is_seen_while_a_bundle_is_deployed_or_after_it(
    server, sender, device, deploy, options, cli, tmp_path, capsys
):
    # The real commands at both ends: agent, finalize, supervisor and server are processes of their own.
    words = [secrets.token_hex(16).encode() for _ in range(2)]
    pear = device("pear", PATH=os.environ["PATH"], EDGEGLM_SECRET=words[0].decode())
    token = pear.home / "token"
    token.write_bytes(words[1])
    token.chmod(0o600)
    words.append((sender / ".ssh/pear").read_bytes().splitlines()[-3])
    mine = msgspec.structs.replace(
        options,
        python=sys.executable,
        ready_seconds=60.0,
        rounds=7,
        serve_flags=(f"--token-file={token}",),
    )
    said = []
    with watcher() as seen:
        summary = deploy(
            real_bundle(tmp_path / "real"),
            options=mine,
            summary_path=tmp_path / "summary.json",
            on_change=lambda *change: said.append(" ".join(change)),
        )
        assert summary.exit_code == 0, summary.devices
        printed = capsys.readouterr()
        said += [printed.out, printed.err, cli("logs", "pear"), cli("devices", "--refresh", "--json")]
    assert seen.samples > 20
    for part in (b"EDGEGLM_LOADER", b"finalize", b"edgeglm.deploy.device.supervise", b"serve\0bundle"):
        assert any(part in line for line in seen.seen), f"{part!r} ran and was not watched"
    assert seen.hits(words) == []
    told = "\n".join(said).encode()
    assert not any(word in told for word in words)
    token.unlink()
    places = [pear.root, Path(os.environ["EDGEGLM_STORE"]), server.folder, tmp_path / "summary.json"]
    assert files_with(words[1:], *places) == []
    assert files_with(words[:1], *places) == [server.folder / "authorized_keys"], (
        "where we put it, no further"
    )
    state = json.loads((pear.root / "run/state.json").read_bytes())
    for pid in (state["pid"], state["child"]):
        assert not any(word in Path(f"/proc/{pid}/environ").read_bytes() for word in words)
