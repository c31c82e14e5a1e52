"""How the sender and the device talk: a JSON object a line, with raw bytes behind some lines.

What the device says is one deflated stream, let go after each line: much of it was said before.
"""

from __future__ import annotations

import json
import select
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 18


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

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock, suppress(OSError, ValueError):
            self._sink.write(self._deflating.compress(line) + self._deflating.flush(zlib.Z_SYNC_FLUSH))
            self._sink.flush()

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None when the sender has gone."""
        line = self._source.readline()
        if not line.endswith(b"\n"):
            return None
        found = json.loads(line)
        if not isinstance(found, dict):
            raise Refused("the sender spoke no edgeglm; use the same version on both sides")
        return found

    def chunk(self, size: int) -> bytes:
        """Return up to ``size`` bytes of what follows a line. Raises SenderGone at the end."""
        # What is there and no more: a full buffer would be lost with a connection that ends before it is.
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
        ready, _, _ = select.select([self._source], [], [], 0)
        return bool(ready) and not self._source.peek(1)  # type: ignore[attr-defined]
