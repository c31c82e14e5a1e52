"""Skips that are never read as passes: loud here, and a failure in CI where CI can have what is absent."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest


def loud_skip(text: str) -> NoReturn:
    """Skip the test, saying what is absent; fail it under EDGEGLM_CI=1.

    For what CI installs, fetches or is allowed to do. What CI need not have skips by ``pytest.skip``,
    with a text that says so.
    """
    if os.environ.get("EDGEGLM_CI") == "1":
        pytest.fail(f"{text}. In CI this is a failure.", pytrace=False)
    pytest.skip(text)


def mount_small_disk(folder: Path, options: str) -> None:
    """Mount a small file system in memory at ``folder``; the caller unmounts it.

    Skips for a person without the right to, which root has in CI.
    """
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return
    reason = done.stderr.partition("\n")[0]
    said = f"NOT ALLOWED HERE: to mount a small disk needs root ({reason}); nothing was tested"
    if os.geteuid() == 0:
        loud_skip(said)
    pytest.skip(f"{said}, nor is it by a CI that is not root")
