"""A line in the user's crontab that starts the server after a reboot, where there is no systemd."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeglm.deploy.device.wire import Refused


def boot_line(root: Path, command: Sequence[str], environment: Mapping[str, str], log: Path) -> str:
    """Return the line: cron runs it once after each start of the device, in the slot that is then current.

    Args:
        root: Where the slots lie. It also marks the line as ours.
        command: What is started, in the folder of the slot.
        environment: Variables that it needs besides those of cron.
        log: What it writes goes to the end of this file.
    """
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(environment.items()))
    folder = shlex.quote(f"{root}/current")
    text = f"cd {folder} && {variables} exec {shlex.join(command)} >>{shlex.quote(str(log))} 2>&1"
    return f"@reboot {text} {_mark(root)}".replace("%", r"\%")  # a bare % ends a line of a crontab


def install_line(root: Path, line: str) -> None:
    """Put the line into the user's crontab, in place of a former one for the same root. Raises Refused."""
    _write([*_others(root), line])


def remove_line(root: Path) -> None:
    """Take the line of a root out of the user's crontab; all others stay as they are. Raises Refused."""
    kept = _others(root)
    if kept != _lines():
        _write(kept)


def check_crontab() -> None:
    """Raise Refused where there is no crontab."""
    _lines()


def _mark(root: Path) -> str:
    return f"# edgeglm at {root}"


def _others(root: Path) -> list[str]:
    mark = _mark(root).replace("%", r"\%")
    return [line for line in _lines() if not line.endswith(mark)]


def _lines() -> list[str]:
    if shutil.which("crontab") is None:
        raise Refused("there is no crontab on the device; install cron there, or pass --service process")
    # It ends with 1 where the user has none yet.
    done = _crontab("-l")
    return done.stdout.removesuffix("\n").split("\n") if done.returncode == 0 and done.stdout else []


def _write(lines: Sequence[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    done = _crontab("-", text)
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise Refused(f"cannot change the user's crontab: {words}; allow it, or pass --service process")


def _crontab(argument: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = ["crontab", argument]
    # Bytes that are no UTF-8 come back as they were.
    utf8: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
    try:
        return subprocess.run(command, input=text, capture_output=True, timeout=20, check=False, **utf8)
    except (OSError, subprocess.SubprocessError) as error:
        raise Refused(f"crontab on the device failed: {error}; mend it, or pass --service process") from error
