"""If this fails, a new board cannot be given the device half: a wheel of the lock is gone or has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.assets
def test_the_wheels_of_a_board_are_still_to_be_had(repository: Path):
    venv = Path(sys.prefix)
    done = subprocess.run(
        [repository / "scripts/aarch64-wheels"],
        env={**os.environ, "EDGEGLM_VENV": str(venv)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert [line.split(" on aarch64: ")[0] for line in found] == ["Python 3.10", "Python 3.12"] * 2
    for line in found[:2]:
        for wheel in ("numpy ", "onnxruntime ", "tokenizers ", "msgspec "):
            assert wheel in line
    for line in found[2:]:
        assert "cryptography " in line
