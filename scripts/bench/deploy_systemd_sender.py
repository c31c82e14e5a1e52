"""Who deploys to the Debian of deploy_systemd.py, and what can be seen of it from outside and inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.fixtures.debian import Machine

ROOT = Path(__file__).resolve().parent.parent.parent
PORT = 8321
UNIT = "edgeglm.service"
URL = f"http://127.0.0.1:{PORT}"
_WAIT_SECONDS = 240.0


class Bench:
    """The Debian, and a sender who may log in to it as root."""

    def __init__(self, work: Path, machine: Machine, key: Path) -> None:
        self.work, self.machine = work, machine
        home = work / "sender"
        (home / ".ssh").mkdir(parents=True)
        host_key = (machine.files / "etc/ssh/ssh_host_ed25519_key.pub").read_text().rpartition(" ")[0]
        (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{machine.port} {host_key}\n")
        (home / ".ssh/config").write_text(
            f"Host device\n  HostName 127.0.0.1\n  Port {machine.port}\n  User root\n  IdentityFile {key}\n"
        )
        own = {"HOME": str(home), "EDGEGLM_STORE": str(work / "store"), "PYTHONPATH": str(ROOT)}
        self.environment = {**os.environ, **own}
        self.environment.pop("SSH_AUTH_SOCK", None)

    def edgeglm(self, *words: object, code: int = 0) -> tuple[Any, float]:
        """Run a command with ``--json``; return what it printed and its seconds. Ends the bench otherwise."""
        command = [sys.executable, "-m", "edgeglm.cli.main", *map(str, words), "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode != code:
            raise SystemExit(
                f"{' '.join(command[3:])} ended with {done.returncode}: {done.stderr}{done.stdout}"
            )
        return json.loads(done.stdout), seconds

    def deploy(self, bundle: Path, *words: object, code: int = 0) -> tuple[dict[str, Any], float]:
        """Deploy to the Debian, which is no board of the bundle's target; return its row and the seconds."""
        found, seconds = self.edgeglm(
            "deploy", bundle, "device", "--port", PORT, "--any-board", *words, code=code
        )
        return dict(found["devices"][0]), seconds

    def show(self, name: str) -> str:
        """Return a property of the unit."""
        return self.machine.run("systemctl", "show", "--value", "-p", name, UNIT)

    def state(self) -> dict[str, Any]:
        """Return what the supervisor says of itself."""
        return dict(json.loads(self.machine.run("cat", "/run/edgeglm/state.json")))

    def served(self) -> str:
        """Return the digest of what answers; nothing where nothing does."""
        try:
            with urllib.request.urlopen(f"{URL}/v2/models/text", timeout=2) as found:
                return str(json.loads(found.read())["versions"][0])
        except (OSError, KeyError, ValueError):
            return ""

    def until(self, what: Callable[[], bool], words: str) -> float:
        """Wait for something; return the seconds that took."""
        started = time.perf_counter()
        while not what():
            if time.perf_counter() - started > _WAIT_SECONDS:
                log = self.machine.run("journalctl", "-u", UNIT, "-n", "30", "--no-pager", check=False)
                raise SystemExit(f"{words} did not come in {_WAIT_SECONDS:g} s: {log}")
            time.sleep(0.02)
        return time.perf_counter() - started


def ready() -> bool:
    """Ask once."""
    try:
        with urllib.request.urlopen(f"{URL}/v2/health/ready", timeout=2) as found:
            return bool(found.status == 200)
    except OSError:
        return False


def hold(fact: object, words: str) -> None:
    """End the bench where something is not as it should be."""
    if not fact:
        raise SystemExit(words)
