"""What a device without internet is sent: edgeglm's wheel, its locked dependencies, pip to install them."""

from __future__ import annotations

import platform
import sys
import zipfile
from pathlib import Path

import msgspec
import pytest

from edgeglm.core.errors import UserError
from edgeglm.deploy.wheels import built_wheel, wheels_for
from tests.deploy.helpers import real_bundle
from tests.skips import loud_skip


def test_the_wheel_of_the_checkout_is_the_same_each_time_and_built_once(repository: Path, tmp_path: Path):
    one, other = (built_wheel(repository, tmp_path / name) for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes(), "else each deploy would send a new environment"
    made = one.stat().st_mtime_ns
    assert built_wheel(repository, tmp_path / "one").stat().st_mtime_ns == made
    names = zipfile.ZipFile(one).namelist()
    assert "edgeglm/deploy/device/supervise.py" in names
    assert not any(name.startswith("tests/") for name in names)


def test_a_device_that_has_no_lock_is_told_which_ones_there_are(tmp_path: Path):
    with pytest.raises(UserError, match=r"Python 3\.9 on riscv64 \(it has py310-aarch64") as refused:
        wheels_for((3, 9), "riscv64", "2.35", tmp_path)
    assert str(refused.value).endswith("pass --python")


@pytest.mark.assets
def test_a_bare_device_is_given_everything_and_serves(device, deploy, options, tmp_path: Path):
    version = f"py{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
    if not Path(f"scripts/locks/device-{version}.txt").is_file():
        loud_skip(f"there is no lock for {version}")
    pear = device("pear")
    bare = msgspec.structs.replace(options, python=None, ready_seconds=90.0)
    states: list[str] = []
    path = real_bundle(tmp_path / "real")
    (one,) = deploy(path, options=bare, on_change=lambda *said: states.append(said[1])).devices
    assert one.outcome == "done", one.reason
    assert "install" in states
    assert (pear.root / "current/environment/bin/python").exists()
    (again,) = deploy(path, options=bare).devices
    assert again.delivered.sent_bytes < 100_000, "the environment is there"
