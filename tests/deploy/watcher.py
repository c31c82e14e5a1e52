"""Who watches the processes of this machine while something runs: what any user here could see of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

_PAUSE_SECONDS = 0.005


class Watcher:
    """Reads the command line of every process, again and again.

    ``seen``: the command lines, as bytes between zeros. ``samples``: how often all were read.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.seen: set[bytes] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def hits(self, secrets: Sequence[bytes]) -> list[bytes]:
        """Return the command lines in which one of the secrets stands."""
        return [line for line in self.seen if any(secret in line for secret in secrets)]

    def _watch(self) -> None:
        while not self._end.wait(_PAUSE_SECONDS):
            for name in os.listdir("/proc"):  # noqa: PTH208 - on the way of every sample
                if name.isdigit():
                    with contextlib.suppress(OSError):
                        self.seen.add(Path("/proc", name, "cmdline").read_bytes())
            self.samples += 1


@contextlib.contextmanager
def watcher() -> Iterator[Watcher]:
    """Watch until the end of the block."""
    made = Watcher()
    made._thread.start()
    try:
        yield made
    finally:
        made._end.set()
        made._thread.join()


def files_with(secrets: Sequence[bytes], *places: Path) -> list[Path]:
    """Return the files below some folders that hold one of the secrets."""
    found = []
    for path in (path for place in places for path in [place, *place.rglob("*")] if path.is_file()):
        data = path.read_bytes()
        if any(secret in data for secret in secrets):
            found.append(path)
    return found
