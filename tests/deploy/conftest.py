"""Devices behind a real OpenSSH server, bundles for them, and a way to deploy."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeglm.core.store import Store, default_store_root
from edgeglm.deploy.hosts import hosts_from_texts
from edgeglm.deploy.inventory import Inventory, inventory_at
from edgeglm.deploy.options import DeployOptions
from edgeglm.deploy.session import deployed
from edgeglm.deploy.summary import FleetPlan, Summary
from scripts.fixtures.colours import colour_bundle
from scripts.fixtures.loopback import Device, Server, add_device, sshd, stop, stub_python


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
    with sshd(program, tmp_path_factory.mktemp("sshd")) as server:
        yield server


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
        if not any(one.name == name for one in made):
            home = tmp_path / "devices" / name
            made.append(add_device(server, sender, home, port=port, **environment))
        return next(one for one in made if one.name == name)

    yield make
    for one in made:
        stop(one)


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> str:
    """An interpreter for devices that stands in for edgeglm's commands; see stub_python.py."""
    return stub_python(tmp_path_factory.mktemp("stub"), repository, sys.executable)


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
