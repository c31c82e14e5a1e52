"""Sizes and ages as people read them, and words of others as a terminal may show them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Format a size with decimal units: ``1536000`` -> ``1.5 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def ago(seconds: float) -> str:
    """Return how long ago something was, in the largest unit that fits."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def printable(text: str) -> str:
    """Return words of another machine without what would steer the terminal that they are shown on."""
    return "".join(one if one.isprintable() or one == "\t" else "\ufffd" for one in text)
