"""How far a delivery is, and how long each of its steps took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Report:
    """Where a delivery says how far it is. ``state`` is one word, ``note`` a few."""

    on_change: Callable[[str, str], None] = field(default=lambda *_: None)
    seconds: dict[str, float] = field(default_factory=dict)
    _state: str = ""
    _since: float = field(default_factory=time.perf_counter)

    def enter(self, state: str, note: str = "") -> None:
        """Begin a step."""
        now = time.perf_counter()
        if self._state:
            self.seconds[self._state] = round(self.seconds.get(self._state, 0.0) + now - self._since, 3)
        self._state, self._since = state, now
        self.on_change(state, note)

    def note(self, text: str) -> None:
        """Say more of the present step."""
        self.on_change(self._state, text)
