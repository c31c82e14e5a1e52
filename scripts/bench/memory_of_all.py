"""What a process and all that it starts hold at once: the largest sum of their PSS while it runs."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

PERIOD_S = 0.5


def children(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Return a process and all below it; those that end meanwhile are left out."""
    found, rest = [], [pid]
    while rest:
        one = rest.pop()
        found.append(one)
        for listing in (proc / str(one) / "task").glob("*/children"):
            try:
                rest += map(int, listing.read_text().split())
            except OSError:
                continue
    return found


def pss_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Return the proportional set size of one process: shared pages count by share. 0 if it is gone."""
    try:
        lines = (proc / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class PeakOfAll:
    """Samples the memory of a process and its children, in a thread, while the context lasts."""

    def __init__(self, pid: int, period: float = PERIOD_S) -> None:
        self.pid, self.period, self.peak_bytes = pid, period, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, sum(map(pss_bytes, children(self.pid))))
            if self._done.wait(self.period):
                return

    def __enter__(self) -> PeakOfAll:
        """Start to sample."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; the peak stays."""
        self._done.set()
        self._thread.join()
