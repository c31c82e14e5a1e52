"""A real OpenSSH server on loopback, and devices behind it: each has a key, a home and a name of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
LogLevel {level}
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


@contextmanager
def sshd(program: str, folder: Path, *, log_level: str = "ERROR") -> Iterator[Server]:
    """Run a server as the present user, with a host key of its own, on a free port."""
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")]
    subprocess.run(keygen, check=True)
    (folder / "authorized_keys").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "config").write_text(SSHD.format(port=port, folder=folder, level=log_level))
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


def add_device(
    server: Server, sender: Path, home: Path, *, port: int | None = None, **environment: str
) -> Device:
    """Make a device called as its home folder, which the sender's SSH configuration names."""
    name = home.name
    key = sender / ".ssh" / name
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
    return Device(name, home)


def stop(device: Device, *, root: Path | None = None) -> None:
    """End what a device still runs."""
    try:
        pid = json.loads(((root or device.root) / "run/state.json").read_bytes())["pid"]
        if b"supervise" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.killpg(pid, signal.SIGKILL)
    except (OSError, KeyError):
        return


def stub_python(folder: Path, repository: Path, python: str) -> str:
    """Write the interpreter that stands in for edgeglm's commands; see stub_python.py."""
    path = folder / "python"
    text = (Path(__file__).parent / "stub_python.py").read_text().replace("@REPOSITORY@", str(repository))
    body = path.with_suffix(".py")
    body.write_text(text.replace("HERE = Path(__file__).resolve()", f"HERE = Path({str(path)!r})"))
    path.write_text(f'#!/bin/sh\nexec "{python}" -S "{body}" "$@"\n')
    path.chmod(0o755)
    return str(path)
