"""What scripts/test says at its end: the seconds of each step, of the one that failed too."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKS = ("ruff", "mypy, strict", "mypy of the device half", "import directions")


def _copy(repository: Path, folder: Path, *, failing: str = "") -> Path:
    """Return a checkout whose setup does nothing and whose tools only end well, but for one."""
    (folder / "scripts").mkdir(parents=True)
    for name in ("test", "check", "steps.sh", "device-half.txt"):
        shutil.copy2(repository / "scripts" / name, folder / "scripts" / name)
    tools = ["scripts/setup", "scripts/lint", ".venv/bin/mypy", ".venv/bin/lint-imports", ".venv/bin/python"]
    for tool in tools:
        path = folder / tool
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\nexit {7 if tool.endswith(failing or '-') else 0}\n")
        path.chmod(0o755)
    return folder / "scripts/test"


def _seconds(command: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    monkeypatch.delenv("EDGEGLM_VENV", raising=False)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _, _, end = done.stdout.partition("== seconds by step\n")
    lines = [re.fullmatch(r" *\d+ s  (.*)", line) for line in end.splitlines()]
    return done.returncode, [line[1] if line else "unreadable" for line in lines]


def test_every_step_is_told_with_its_seconds(repository, tmp_path, monkeypatch):
    script = str(_copy(repository, tmp_path / "copy"))
    assert _seconds([script], monkeypatch) == (0, ["setup", *CHECKS, "pytest"])
    assert _seconds([script, "tests/core"], monkeypatch) == (0, ["setup", "pytest"])


def test_the_step_that_failed_is_the_last_and_gives_the_status(repository, tmp_path, monkeypatch):
    script = str(_copy(repository, tmp_path / "imports", failing="lint-imports"))
    assert _seconds([script], monkeypatch) == (7, ["setup", *CHECKS[:-1], "import directions, failed"])
    script = str(_copy(repository, tmp_path / "pytest", failing="python"))
    assert _seconds([script], monkeypatch) == (7, ["setup", *CHECKS, "pytest, failed"])
