"""Numbers as a reader likes them. Every function takes None for "not measured"."""

from __future__ import annotations

ABSENT = "\u2013"


def rate(value: float | None) -> str:
    """Return three decimals of a rate in [0, 1]."""
    return ABSENT if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """Return a share as ``97.2 %``."""
    return ABSENT if value is None else f"{100 * value:.1f} %"


def times(value: float | None) -> str:
    """Return a ratio as ``8.3x`` with a multiplication sign."""
    return ABSENT if value is None else f"{value:.1f}\u00d7"


def milliseconds(value: float | None) -> str:
    """Return milliseconds with three significant digits, without the unit."""
    if value is None:
        return ABSENT
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """Return ``0.4 s``, ``42 s`` or ``3 min 05 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def size(value: int | None) -> str:
    """Return bytes as ``3.4 MB`` (decimal units)."""
    if value is None:
        return ABSENT
    if value < 1000:
        return f"{value} B"
    amount, unit = float(value), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        amount, unit = amount / 1000, larger
        if amount < 999.5:
            break
    return f"{amount:.0f} {unit}" if amount >= 99.5 else f"{amount:.1f} {unit}"


def count(value: int | None) -> str:
    """Return ``26.4 M``, ``812 k`` or the number itself below a thousand."""
    if value is None:
        return ABSENT
    if value < 1000:
        return str(value)
    if value < 999_500:
        return f"{value / 1e3:.0f} k"
    return f"{value / 1e6:.1f} M" if value < 99_950_000 else f"{value / 1e6:.0f} M"
