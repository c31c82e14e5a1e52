"""Another architecture, honestly: an aarch64 Python under qemu is sent wheels, finalizes, serves, goes back.

The device's SSH server and shell are this machine's; its Python and everything that Python runs are aarch64.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from scripts.fixtures.loopback import Server, sshd
from tests.deploy.helpers import content, real_bundle

WRAPPER = """#!/bin/sh
export QEMU_CPU=cortex-a72 OPENBLAS_NUM_THREADS=1
exec "{device}/qemu" -0 "$0" -L "{device}/system" "{device}/system/usr/bin/python3.11" "$@"
"""


@pytest.fixture
def server(require_system: Callable[[str], str], tmp_path: Path, repository: Path) -> Iterator[Server]:
    """A server whose sessions see no /sys: ONNX Runtime looks its caches up there and falls over x86's."""
    if platform.machine() != "x86_64":
        pytest.skip("this machine is what the emulated one stands in for")
    if os.getuid() != 0:
        pytest.skip(
            "NOT ALLOWED HERE, nor by a CI that is not root: a namespace of its own; nothing was tested"
        )
    for program in ("apt-get", "dpkg-deb", "unshare"):
        require_system(program)
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin"
    program = require_system("sshd")
    device = Path(os.environ.get("EDGEGLM_EMULATED_DEVICE", tmp_path / "emulated"))
    if not (device / "made").exists():
        subprocess.run([repository / "scripts/emulated-device", device], check=True, timeout=900)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(WRAPPER.format(device=device))
    (tmp_path / "bin/python3").chmod(0o755)
    apart = tmp_path / "sshd-apart"
    apart.write_text(
        f'#!/bin/sh\nexec unshare --mount sh -c \'mount -t tmpfs none /sys && exec {program} "$@"\' sh "$@"\n'
    )
    apart.chmod(0o755)
    (tmp_path / "sshd").mkdir()
    with sshd(str(apart), tmp_path / "sshd") as running:
        yield running


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.assets
def test_an_aarch64_device_is_given_wheels_finalizes_serves_and_goes_back(
    server, device, deploy, options, cli, tmp_path: Path, record_property
):
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    arm = device("arm", PATH=path)
    bare = msgspec.structs.replace(options, python=None, ready_seconds=300.0, rounds=7)
    before, after = real_bundle(tmp_path / "one"), real_bundle(tmp_path / "two", scale=2.0)
    (first,) = deploy(before, "arm", options=bare).devices
    assert first.outcome == "done", first.reason
    assert first.delivered is not None
    assert first.delivered.receipt["board"]["machine"] == "aarch64"
    assert arm.record()["content_digest"] == content(before)
    (second,) = deploy(after, "arm", options=bare).devices
    assert second.outcome == "done", second.reason
    assert arm.record()["content_digest"] == content(after)
    (back,) = json.loads(cli("rollback", "arm", "--ready-seconds", "300", "--json"))
    assert arm.record()["content_digest"] == content(before)
    found = {
        "machine": first.delivered.receipt["board"]["machine"],
        "library": [first.delivered.receipt[name] for name in ("library", "library_version")],
        "chosen": [one.delivered.chosen for one in (first, second)],
        "seconds": [one.delivered.seconds for one in (first, second)],
        "sent_bytes": [one.delivered.sent_bytes for one in (first, second)],
        "rollback_seconds": back["answer"]["seconds"],
    }
    record_property("found", json.dumps(found))  # for scripts/bench/emulated_deploy.py
