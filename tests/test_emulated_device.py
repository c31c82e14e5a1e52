"""The device half on aarch64, under qemu: wheels, arithmetic, commands. Minutes, and a network."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.system
def test_an_aarch64_device_finalizes_and_runs_a_bundle_offline(
    tmp_path: Path, repository: Path, require_system: Callable[[str], str]
):
    if platform.machine() != "x86_64":
        pytest.skip("this machine is what the emulated one stands in for")
    for program in ("apt-get", "dpkg-deb", "unshare"):
        require_system(program)
    bundle = tmp_path / "demo.zip"
    shutil.copyfile(repository / "tests/bundle/fixtures/schema-1.zip", bundle)

    def device(*arguments: str) -> str:
        done = subprocess.run(
            [repository / "scripts/emulated-device", tmp_path / "device", "edgeglm", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    receipt = json.loads(device("finalize", str(bundle), "--rounds", "7", "--json"))
    assert (receipt["board"]["machine"], receipt["evidence"]) == ("aarch64", "ONNX Runtime")
    for candidate in receipt["candidates"]:
        assert candidate["selftest"]["image_cosine_min"] > 0.99999, "pictures decode and resize the same"
    answer = json.loads(device("run", str(bundle), "--query", "green", "--json"))
    assert answer["hits"][0]["id"] == "set/green"
    assert "chosen by the receipt" in answer["through"]
