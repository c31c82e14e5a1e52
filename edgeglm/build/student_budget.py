"""What a student may cost, read from a command line, and whether one meets it."""

from __future__ import annotations

import re
from decimal import Decimal
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


class Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a command line asked a search for. ``fixed`` says that it set the side of the images itself.

    ``resolution`` is the recipe's, before a student was chosen.
    """

    budget: Budget
    trials: int
    resolution: int
    fixed: bool

    def options(self, *, usual_trials: int) -> list[str]:
        """Return the options that ask for it again."""
        budget, words = self.budget, list[str]()
        if budget.latency_ms is not None:
            words += ["--latency-budget", f"{_plain(budget.latency_ms)}ms"]
        if budget.memory_bytes is not None:
            words += ["--memory-budget", _sized(budget.memory_bytes)]
        return words if self.trials == usual_trials else [*words, "--trials", str(self.trials)]


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


def _sized(amount: float) -> str:
    """Write bytes in the largest unit in which they are read as the very same."""
    for unit in ("GB", "MB", "KB"):
        text = _plain(amount / _UNITS["memory"][unit.lower()])
        if float(text) >= 1 and float(text) * _UNITS["memory"][unit.lower()] == amount:
            return f"{text}{unit}"
    return f"{_plain(amount)}B"


def _plain(value: float) -> str:
    """Write a number without an exponent, which no budget is read with."""
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
