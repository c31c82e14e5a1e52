"""A device's disk that is full, fills up, or cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.deploy.helpers import reason
from tests.skips import mount_small_disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, which a person without the right to mount cannot have."""

    def mount(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount_small_disk(folder, options)
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], capture_output=True, check=False)


def test_a_full_disk_is_told_before_anything_is_sent(device, bundle, deploy, options, small_disk):
    device("pear")
    root = small_disk("size=2m")
    mine = msgspec.structs.replace(options, root=str(root / "edgeglm"))
    words = reason(deploy(bundle(payload=os.urandom(6_000_000)), options=mine))
    assert "MB are free" in words
    assert words.endswith("or pass --root on another disk")


def test_a_disk_that_fills_up_on_the_way_is_told_and_leaves_the_former_bundle(
    device, bundle, deploy, options, small_disk, monkeypatch
):
    device("pear")
    monkeypatch.setattr("edgeglm.deploy.delivery.check_space", lambda *_, **__: None)
    root = small_disk("size=2m")
    mine = msgspec.structs.replace(options, root=str(root / "edgeglm"))
    assert deploy(bundle("good"), options=mine).exit_code == 0
    words = reason(deploy(bundle("large", payload=os.urandom(6_000_000)), options=mine))
    assert "No space left on device" in words
    state = json.loads((root / "edgeglm/run/state.json").read_bytes())
    assert state["ready"]
    os.killpg(state["pid"], 9)


def test_a_disk_that_cannot_be_written_is_told(device, bundle, deploy, options, small_disk):
    device("pear")
    mine = msgspec.structs.replace(options, root=str(small_disk("ro,size=1m") / "edgeglm"))
    words = reason(deploy(bundle(), options=mine))
    assert "Read-only file system; mount it for writing" in words
