"""What ``tegrastats`` tells of a Jetson, for boards or containers that show no sensor files.

Source: "tegrastats Utility", NVIDIA Jetson Linux Developer Guide; its lines differ from release to release.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgeglm.engines.board import Conditions, conditions

_INTERVAL_MS = 100
_WAIT_SECONDS = 2.0  # for the first line
_STOP_SECONDS = 5.0
_FRESH_SECONDS = 1.0
_OFF = -200.0  # degrees: a zone that is switched off says -256
# "VDD_IN 4900mW/5000mW": now and the mean so far; a third figure came with L4T 39, the unit with L4T 35.
_RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*) (\d+)(?:mW)?/\d+(?:mW)?(?:/\d+mW)?(?!\S)")
_ZONE = re.compile(r"(?<!\S)([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C")


def tegrastats_here(root: Path = Path("/")) -> str | None:
    """Return the program on PATH; None where there is none, or for the files of another board."""
    return shutil.which("tegrastats") if root == Path("/") else None


def rails_from_tegrastats(line: str) -> dict[str, float]:
    """Return ``{rail: milliwatts}`` of one line of ``tegrastats``: the present power, not its running mean.

    ``NC`` is a channel to which nothing is connected.
    """
    return {name: float(now) for name, now in _RAIL.findall(line) if name != "NC"}


def temperatures_from_tegrastats(line: str) -> dict[str, float]:
    """Return ``{thermal zone: degrees Celsius}`` of one line; a zone that is switched off is left out."""
    return {name: float(now) for name, now in _ZONE.findall(line) if float(now) > _OFF}


def line_of(program: str, *, wait: float = _WAIT_SECONDS) -> str:
    """Run ``tegrastats`` until its first line, which is returned; empty if none comes in ``wait`` seconds."""
    try:
        child = subprocess.Popen(
            [program, "--interval", str(_INTERVAL_MS)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return ""
    assert child.stdout is not None
    found, until = b"", time.monotonic() + wait
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while b"\n" not in found and selector.select(max(until - time.monotonic(), 0)):
                part = os.read(child.stdout.fileno(), 65536)
                if not part:
                    break
                found += part
    finally:
        child.stdout.close()
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_SECONDS)
        if child.poll() is None:
            child.kill()
            child.wait()
    line, end, _ = found.partition(b"\n")
    return line.decode(errors="replace") if end else ""


class Sensors:
    """Reads the conditions of a board: its files and its GPU, else ``tegrastats``. May block for seconds.

    Args:
        root: Where the board's files are.
        tegrastats: The program; the one on PATH of a board at ``/`` if None.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        tegrastats: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._clock = root, clock
        self._program = tegrastats or tegrastats_here(root)
        self._lock = threading.Lock()
        self._told: tuple[float, Conditions] | None = None

    def read(self) -> Conditions:
        """Return the conditions now, a second old at most; what nobody tells is absent. From any thread."""
        with self._lock:
            now = self._clock()
            if self._told is None or now - self._told[0] >= _FRESH_SECONDS:
                self._told = now, self._read()
            return self._told[1]

    def _read(self) -> Conditions:
        found = conditions(self._root)
        if self._program is None or (found.temperatures_c and found.rails_mw):
            return found
        line = line_of(self._program)
        return msgspec.structs.replace(
            found,
            temperatures_c=found.temperatures_c or temperatures_from_tegrastats(line),
            rails_mw=found.rails_mw or rails_from_tegrastats(line),
        )
