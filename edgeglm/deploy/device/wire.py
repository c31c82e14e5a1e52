"""How the sender and the device talk: a JSON object a line, with raw bytes behind some lines.

What the device says is one deflated stream, let go after each line: much of it was said before.

A connection may end without a word to this end, whose server then waits for hours. So the sender sends an
empty line now and then, and one of which nothing is heard for long has gone.
"""

from __future__ import annotations

import json
import select
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 18
_SAID_BYTES = 1 << 16


class Refused(Exception):  # noqa: N818 - it is an answer, and the sender raises it as an error of its own
    """What the device says no to. The last clause is the remedy; ``code`` as the command line exits."""

    def __init__(self, message: str, *, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


class SenderGone(Exception):  # noqa: N818
    """The connection ended in the middle of something."""


class Wire:
    """The device's end. What it says is lost in silence once nobody listens: work goes on to its end."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink
        self._deflating = zlib.compressobj()
        self._lock = threading.Lock()
        self._silence = 0.0
        self._heard = time.monotonic()

    def give_up_after(self, seconds: float) -> None:
        """Take a sender for gone of which nothing is heard for so long, or who takes nothing that is said."""
        self._silence = seconds
        signal.signal(signal.SIGALRM, _gone)

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something. Raises SenderGone in the main thread, where the sender takes none of it."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock, suppress(OSError, ValueError):
            data = self._deflating.compress(line) + self._deflating.flush(zlib.Z_SYNC_FLUSH)
            for start in range(0, len(data), _SAID_BYTES):
                with self._patience():
                    self._sink.write(data[start : start + _SAID_BYTES])
                    self._sink.flush()

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None when the sender has gone."""
        line = b"\n"
        while line == b"\n":
            with self._patience():
                line = self._source.readline()
        if not line.endswith(b"\n"):
            return None
        self._heard = time.monotonic()
        found = json.loads(line)
        if not isinstance(found, dict):
            raise Refused("the sender spoke no edgeglm; use the same version on both sides")
        return found

    def chunk(self, size: int) -> bytes:
        """Return up to ``size`` bytes of what follows a line. Raises SenderGone at the end."""
        # What is there and no more: a full buffer would be lost with a connection that ends before it is.
        with self._patience():
            data: bytes = self._source.read1(min(size, _CHUNK_BYTES))  # type: ignore[attr-defined]
        if not data:
            raise SenderGone
        return data

    def exactly(self, size: int) -> bytes:
        """Return ``size`` bytes of what follows a line. Raises SenderGone when they do not come."""
        parts = []
        while size:
            parts.append(self.chunk(size))
            size -= len(parts[-1])
        return b"".join(parts)

    def drain(self) -> None:
        """Take what still comes and drop it: a sender that writes must get to read."""
        with suppress(OSError, SenderGone):
            while True:
                self.chunk(_CHUNK_BYTES)

    def gone(self) -> bool:
        """Say whether the sender has gone, without waiting. To be asked between a question and its answer."""
        while select.select([self._source], [], [], 0)[0]:
            waiting: bytes = self._source.peek(1)  # type: ignore[attr-defined]
            if not waiting or waiting.strip(b"\n"):
                return not waiting
            self._source.read(len(waiting))
            self._heard = time.monotonic()
        return 0 < self._silence < time.monotonic() - self._heard

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """Let what is done now wait for the sender no longer than ``give_up_after`` says."""
        limited = self._silence > 0 and threading.current_thread() is threading.main_thread()
        if limited:
            signal.setitimer(signal.ITIMER_REAL, self._silence)
        try:
            yield
        finally:
            if limited:
                signal.setitimer(signal.ITIMER_REAL, 0)


def _gone(*_: object) -> None:
    raise SenderGone
