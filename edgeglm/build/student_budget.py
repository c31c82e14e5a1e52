"""What a student may cost, read from a command line, and whether one meets it."""

from __future__ import annotations

import re
from typing import Protocol

import msgspec

from edgeglm.core.errors import UserError

_UNITS = {
    "latency": {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3},
    "memory": {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
}


class Costing(Protocol):
    """What a budget is about."""

    @property
    def judged_ms(self) -> float:
        """Milliseconds of an image and a text, where they are judged."""

    @property
    def file_bytes(self) -> int:
        """Of both FP32 files, which is what their weights take in memory."""


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a student may take at most; None sets no bound. ``latency_ms`` is of an image and a text."""

    latency_ms: float | None = None
    memory_bytes: float | None = None

    def excess(self, cost: Costing) -> float:
        """Return the largest ratio of cost to budget; at most 1 meets it."""
        latency = cost.judged_ms / self.latency_ms if self.latency_ms else 0.0
        return max(latency, cost.file_bytes / self.memory_bytes if self.memory_bytes else 0.0)

    def __str__(self) -> str:
        """Write it for people."""
        asked = (
            f"latency {self.latency_ms:g} ms" if self.latency_ms else "",
            f"memory {self.memory_bytes / 1e6:g} MB" if self.memory_bytes else "",
        )
        return ", ".join(filter(None, asked))


def budget_of(latency: str | None, memory: str | None) -> Budget | None:
    """Read budgets such as ``10ms`` and ``20MB``; None for neither. Raises UserError."""
    if latency is None and memory is None:
        return None
    return Budget(
        latency_ms=None if latency is None else _amount(latency, "latency", "10ms"),
        memory_bytes=None if memory is None else _amount(memory, "memory", "20MB"),
    )


def _amount(text: str, kind: str, example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS[kind].get(found[2].lower()) if found else None
    if found is None or factor is None or float(found[1]) <= 0:
        units = ", ".join(unit for unit in _UNITS[kind] if unit)
        raise UserError(
            f"cannot read the {kind} budget {text!r}; "
            f"write it as {example} (a positive number and one of {units})"
        )
    return float(found[1]) * factor
