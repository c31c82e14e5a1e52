"""Warnings held back in several threads at once.

``warnings.catch_warnings`` keeps the filters of the whole process and puts them back. Two threads in it at a
time put back each other's, and the process never warns of anything again.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from typing import Any

_EVERYTHING: Any = ("ignore", re.compile(""), Warning, None, 0)  # equal to no filter that others set


class _Quiet:
    """One filter ahead of all others while anybody is inside; those of others stay as they are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._lists: list[Any] = []  # of filters: others may put another in place meanwhile

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            filters: Any = warnings.filters
            if _EVERYTHING not in filters[:1]:
                filters.insert(0, _EVERYTHING)
                self._lists.append(filters)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._end()

    def forked(self) -> None:
        """Begin anew in a child, where nobody comes back who was inside."""
        self._end()
        self._lock, self._inside = threading.Lock(), 0

    def _end(self) -> None:
        for filters in (*self._lists, warnings.filters):
            while _EVERYTHING in filters:
                filters.remove(_EVERYTHING)
        self._lists.clear()


quiet = _Quiet()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=quiet.forked)
