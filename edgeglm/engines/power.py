"""Energy over a stretch of work: the power of each rail, sampled while it lasts and integrated.

Jetson boards show the INA sensors of their power rails under ``/sys/class/hwmon`` (where ``tegrastats``
reads them too). A rail may feed others (``VDD_IN`` is the whole board), so rails are not summed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edgeglm.engines.board import rails_mw

INTERVAL_S = 0.1
"""The sensors average over about as long; reading them more often says nothing new."""

Sample = tuple[float, dict[str, float]]


class Energy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stretch of work took.

    Attributes:
        seconds: From the first sample to the last.
        samples: How many there are.
        joules: ``{rail: energy}``, the integral of its power by the trapezoid rule.
    """

    seconds: float
    samples: int
    joules: dict[str, float]


def energy_of(samples: Sequence[Sample]) -> Energy | None:
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
    return Energy(seconds=round(samples[-1][0] - samples[0][0], 3), samples=len(samples), joules=joules)


class PowerWatch:
    """Samples the rails of one board while :meth:`watching`; :attr:`energy` is there afterwards."""

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        clock: Callable[[], float] = time.monotonic,
        every: float = INTERVAL_S,
    ) -> None:
        """Prepare to read the sensors under ``root``, each ``every`` seconds."""
        self._root = root
        self._clock = clock
        self._every = every
        self._samples: list[Sample] = []

    @property
    def energy(self) -> Energy | None:
        """What was measured; None where the board has no sensor."""
        return energy_of(self._samples)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample from now until the block ends. A board without sensors gets no thread."""
        self._samples.clear()
        if not self._sampled():
            yield
            return
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

    def _sampled(self) -> bool:
        power = rails_mw(self._root)
        self._samples.append((self._clock(), power))
        return bool(power)
