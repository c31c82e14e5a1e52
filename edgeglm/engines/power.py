"""Energy over a stretch of work: the power of each rail, sampled while it lasts and integrated.

Jetson boards show the INA sensors of their power rails under ``/sys/class/hwmon``; where they do not, as on
older releases, ``tegrastats`` prints the same. A rail may feed others (``VDD_IN`` and ``VIN`` are the whole
board), so rails are not summed. A discrete GPU is one rail, told by NVML.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from edgeglm.engines.board import rails_mw
from edgeglm.engines.tegrastats import rails_from_tegrastats, tegrastats_here

INTERVAL_S = 0.1
"""The sensors average over about as long; reading them more often says nothing new."""

Source = Literal["INA sensors", "NVML", "tegrastats"]
Sample = tuple[float, dict[str, float]]

_STOP_SECONDS = 5


class Energy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stretch of work took.

    Attributes:
        seconds: From the first sample to the last.
        samples: How many there are.
        joules: ``{rail: energy}``, the integral of its power by the trapezoid rule.
        interval_s: The pause between samples that was asked for.
        source: Who told the power.
    """

    seconds: float
    samples: int
    joules: dict[str, float]
    interval_s: float = INTERVAL_S
    source: Source = "INA sensors"


def energy_of(
    samples: Sequence[Sample], *, interval_s: float = INTERVAL_S, source: Source = "INA sensors"
) -> Energy | None:
    """Integrate samples of (seconds, ``{rail: milliwatts}``), in the order of time.

    A rail that is lacking in a sample was not read then and is left out. None of fewer than two samples
    or where no rail is left: nothing was measured, which is not nothing used.
    """
    if len(samples) < 2:
        return None
    rails = set.intersection(*(set(power) for _, power in samples))
    if not rails:
        return None
    joules = {}
    for rail in sorted(rails):
        areas = (
            (later - earlier) * (before[rail] + after[rail]) / 2
            for (earlier, before), (later, after) in itertools.pairwise(samples)
        )
        joules[rail] = round(sum(areas) / 1e3, 6)
    return Energy(
        seconds=round(samples[-1][0] - samples[0][0], 3),
        samples=len(samples),
        joules=joules,
        interval_s=interval_s,
        source=source,
    )


class PowerWatch:
    """Samples the rails of one board while :meth:`watching`; :attr:`energy` is there afterwards."""

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        clock: Callable[[], float] = time.monotonic,
        every: float = INTERVAL_S,
        tegrastats: str | None = None,
    ) -> None:
        """Prepare to read the sensors under ``root``, each ``every`` seconds.

        ``tegrastats`` is asked where there is no sensor; if None, the one on PATH of a board at ``/``.
        """
        self._root = root
        self._clock = clock
        self._every = every
        self._tegrastats = tegrastats or tegrastats_here(root)
        self._source: Source = "INA sensors"
        self._samples: list[Sample] = []

    @property
    def energy(self) -> Energy | None:
        """What was measured; None where nobody tells the power."""
        return energy_of(self._samples, interval_s=self._every, source=self._source)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample from now until the block ends. A board that tells nothing gets no thread."""
        self._samples.clear()
        if self._sampled():
            self._source = "NVML" if set(self._samples[0][1]) == {"GPU"} else "INA sensors"
            with self._by_sensors():
                yield
        elif self._tegrastats is not None:
            self._source = "tegrastats"
            with self._by_tegrastats(self._tegrastats):
                yield
        else:
            yield

    @contextmanager
    def _by_sensors(self) -> Iterator[None]:
        done = threading.Event()

        def sample() -> None:
            while not done.wait(self._every):
                self._sampled()

        thread = threading.Thread(target=sample, name="edgeglm-power", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._sampled()

    @contextmanager
    def _by_tegrastats(self, program: str) -> Iterator[None]:
        """Stamp each line as it comes; a program that does not start or says nothing measures nothing."""
        self._samples.clear()
        try:
            child = subprocess.Popen(
                [program, "--interval", str(max(1, round(self._every * 1e3)))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )
        except OSError:
            yield
            return
        assert child.stdout is not None
        lines = child.stdout

        def sample() -> None:
            for line in lines:
                if rails := rails_from_tegrastats(line):
                    self._samples.append((self._clock(), rails))

        thread = threading.Thread(target=sample, name="edgeglm-power", daemon=True)
        thread.start()
        try:
            yield
        finally:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_STOP_SECONDS)
            if child.poll() is None:
                child.kill()
                child.wait()
            thread.join()
            lines.close()

    def _sampled(self) -> bool:
        power = rails_mw(self._root)
        self._samples.append((self._clock(), power))
        return bool(power)
