"""A real OpenSSH server on loopback, and devices behind it: each has a key, a home and a name of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgeglm.core.store import Store, default_store_root
from edgeglm.deploy.delivery import DeployOptions
from edgeglm.deploy.fleet import FleetPlan, Summary, hosts_from_texts
from edgeglm.deploy.inventory import Inventory, inventory_at
from edgeglm.deploy.session import deployed
from tests.runtime.test_retrieval import colour_bundle

SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin yes
PermitUserEnvironment yes
MaxStartups 200
MaxSessions 200
LogLevel ERROR
"""


@dataclass(frozen=True)
class Server:
    """The server and the files that it and its users share."""

    folder: Path
    port: int

    @property
    def host_key(self) -> str:
        return (self.folder / "host_key.pub").read_text().rpartition(" ")[0]


@dataclass(frozen=True)
class Device:
    """One device: a name in the sender's SSH configuration, and a home on the server's side."""

    name: str
    home: Path

    @property
    def root(self) -> Path:
        return self.home / ".local/share/edgeglm"

    def record(self, link: str = "current") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / link / "slot.json").read_bytes())
        return found

    def answers(self) -> str:
        """What the server says it serves; a switch, in which one ends and another begins, is waited for."""
        for _ in range(200):
            try:
                state = json.loads((self.root / "run/state.json").read_bytes())
                with urllib.request.urlopen(f"http://{state['host']}:{state['port']}/", timeout=5) as answer:
                    return str(answer.read().decode())
            except (OSError, KeyError):
                time.sleep(0.05)
        raise AssertionError("nothing is served")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles are packed here by the dozen; the devices, in processes of their own, do sync."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="session")
def server(
    require_system: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin"
    program = require_system("sshd")
    folder = tmp_path_factory.mktemp("sshd")
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")]
    subprocess.run(keygen, check=True)
    (folder / "authorized_keys").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "config").write_text(SSHD.format(port=port, folder=folder))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "-D", "-e", "-f", str(folder / "config")], stderr=log)
        try:
            _wait_for(port)
            yield Server(folder=folder, port=port)
        finally:
            process.terminate()
            process.wait(10)


def _wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError("sshd did not start")


@pytest.fixture
def sender(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of whoever deploys: it knows no device yet."""
    home = tmp_path / "sender"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/known_hosts").write_text("")
    (home / ".ssh/config").write_text("")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


@pytest.fixture
def device(server: Server, sender: Path, tmp_path: Path) -> Iterator[Callable[..., Device]]:
    """Return a function that makes a device of a name; further words are its environment."""
    made: list[Device] = []

    def make(name: str = "pear", *, port: int | None = None, **environment: str) -> Device:
        key, home = sender / ".ssh" / name, tmp_path / "devices" / name
        if not home.exists():
            home.mkdir(parents=True)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
            values = {"HOME": str(home), "EDGEGLM_TRUST": str(home / "trust"), **environment}
            options = ",".join(f'environment="{variable}={value}"' for variable, value in values.items())
            with (server.folder / "authorized_keys").open("a") as file:
                file.write(f"{options} {key.with_suffix('.pub').read_text()}")
            with (sender / ".ssh/config").open("a") as file:
                file.write(
                    f"Host {name}\n  HostName 127.0.0.1\n  Port {port or server.port}\n"
                    f"  IdentityFile {key}\n  IdentitiesOnly yes\n"
                )
            with (sender / ".ssh/known_hosts").open("a") as file:
                file.write(f"[127.0.0.1]:{port or server.port} {server.host_key}\n")
            made.append(Device(name, home))
        return next(one for one in made if one.name == name)

    yield make
    for one in made:
        _stop(one.root / "run/state.json")


def _stop(state: Path) -> None:
    try:
        pid = json.loads(state.read_bytes())["pid"]
        if b"supervise" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.killpg(pid, signal.SIGKILL)
    except (OSError, KeyError):
        return


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> str:
    """An interpreter for devices that stands in for edgeglm's commands; see stub_python.py."""
    path = tmp_path_factory.mktemp("stub") / "python"
    text = (Path(__file__).parent / "stub_python.py").read_text().replace("@REPOSITORY@", str(repository))
    body = path.with_suffix(".py")
    body.write_text(text)
    quoted = shlex.quote(str(body))
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {quoted} "$@"\n')
    path.chmod(0o755)
    body.write_text(text.replace("HERE = Path(__file__).resolve()", f"HERE = Path({str(path)!r})"))
    return str(path)


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a bundle; ``recipe`` says how the stand-in for its server behaves."""

    def make(
        name: str = "one",
        *,
        recipe: str = "",
        map10: float = 0.5,
        payload: bytes = b"",
        tower: bytes = b"onnx",
        created: str = "2026-11-23",
        **more: bytes,
    ) -> Path:
        parts: dict[str, Path | bytes] = {
            **more,
            "models/int8/text.onnx": tower,
            "recipe.toml": f"# {name} {recipe}\n".encode(),
            "metrics.json": json.dumps({"map10": map10}).encode(),
            "costs/payload.bin": payload or b"payload",
        }
        folder = tmp_path / "bundles" / name
        shutil.rmtree(folder, ignore_errors=True)
        return colour_bundle(folder, created, **parts)

    return make


@pytest.fixture
def options(stub: str) -> DeployOptions:
    return DeployOptions(service="process", python=stub, port=0, ready_seconds=10, lock_seconds=5)


@pytest.fixture
def inventory() -> Inventory:
    return inventory_at(default_store_root())


@pytest.fixture
def deploy(options: DeployOptions) -> Callable[..., Summary]:
    """Deploy a bundle to devices by name, quickly: one try, no canary."""

    def run(
        bundle: Path,
        *names: str,
        options: DeployOptions = options,
        plan: FleetPlan | None = None,
        on_change: Callable[[str, str, str], None] = lambda *_: None,
        **more: Any,
    ) -> Summary:
        return deployed(
            bundle,
            hosts_from_texts(names or ("pear",)),
            options,
            plan or FleetPlan(canary=0, retries=0),
            Store(default_store_root()),
            on_change,
            **more,
        )

    return run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command, hold its exit code, and return what it printed."""

    def run(*arguments: object, code: int = 0) -> str:
        from edgeglm.cli.main import exit_code

        actual = exit_code([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert actual == code, captured
        return captured.out if code == 0 else captured.out + captured.err

    return run
