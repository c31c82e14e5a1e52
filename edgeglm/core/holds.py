"""Which entries of a store are in use: a shared lock each, as long as the one who was given it lives."""

from __future__ import annotations

import fcntl
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Holds:
    """The locks of one store object. They go with it, and with its process however that ends.

    Args:
        folder: Has, or gets, a file a key.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._held)

    def take(self, key: str) -> None:
        """Hold a key. Raises OSError where nothing can be locked, as in a store that is only read."""
        with self._lock:
            before = self._held.get(key)
            if before is not None:
                if os.fstat(before).st_nlink:
                    return
                os.close(self._held.pop(key))
            self._held[key] = _shared(self._folder / key)

    def release(self) -> None:
        """Hold nothing any more."""
        with self._lock:
            _close_all(self._held)

    @contextmanager
    def alone(self, key: str) -> Iterator[bool]:
        """Keep everybody from taking a key meanwhile; False if somebody holds it, or nobody can tell."""
        try:
            file = os.open(self._folder / key, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            yield False
            return
        try:
            yield _locked(file)
        finally:
            os.close(file)


def _shared(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except BaseException:
            os.close(file)
            raise
        if os.fstat(file).st_nlink:
            return file
        os.close(file)  # whoever had it alone has removed it


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _close_all(held: dict[str, int]) -> None:
    while held:
        with suppress(OSError):
            os.close(held.popitem()[1])
