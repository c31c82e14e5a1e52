"""`edgeglm build --on`: the whole command, from pairs to engines on a device behind a real SSH server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeglm.bundle.verify import open_bundle
from scripts.fixtures.loopback import Device, add_device, sshd
from tests.build.conftest import Project, Said


@pytest.fixture
def pear(
    require_system: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Device]:
    """A device that stands for one with edgeglm in its image: it has this very Python."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    sender = tmp_path / "sender"
    (sender / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(sender))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "sshd").mkdir()
    with sshd(require_system("sshd"), tmp_path / "sshd") as server:
        yield add_device(server, sender, tmp_path / "devices/pear", PATH=os.environ["PATH"])


def test_one_command_makes_a_bundle_and_finalizes_it_on_the_device(
    project: Project, cold: Said, pear: Device
) -> None:
    root = pear.home / "disk/edgeglm"
    there = ["--on", "pear", "--on-python", sys.executable, "--on-root", str(root)]
    said = project.build("cpu", *there)
    assert said.code == 0, said.err
    assert said.ran == [], "nothing of the build was made anew"
    (one,) = said.json["devices"]
    assert (one["device"], one["outcome"]) == ("pear", "done"), one["reason"]
    receipt = one["delivered"]["receipt"]
    with open_bundle(Path(said.json["bundle"])) as opened:
        assert receipt["content_digest"] == opened.manifest.content_digest
    assert {found["status"] for found in receipt["candidates"]} <= {"chosen", "passed"}
    slot = root / "slots" / one["delivered"]["slot"]
    assert (slot / "bundle.finalized/receipt.json").exists(), "it is staged there"
    assert not (root / "current").is_symlink(), "and not served"
    assert "device-build" in project.stored()
    (row,) = project.edgeglm("devices", "--json").json
    assert (Path(row["evidence"]) / "receipt.json").exists(), "its evidence came home and is found"


def test_a_device_outside_the_target_is_refused_after_the_build_and_the_bundle_stays(
    project: Project, cold: Said, pear: Device
) -> None:
    said = project.build("jetson-agx", "--set", "quantize.calibration_samples=9", "--on", "pear")
    assert said.code == 2
    (one,) = said.json["devices"]
    assert "no GPU is seen on it" in one["reason"]
    assert (Path(said.json["bundle"]) / "manifest.json").exists()
    assert not pear.root.exists()
