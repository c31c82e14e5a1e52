"""Structured logs: one JSON object a line, written by a thread of its own.

The event loop must not wait for whoever reads the log. Lines that nobody takes are dropped, and counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, MutableMapping
from typing import IO, Any

import msgspec

from edgeglm.core.errors import EdgeglmError

_MAX_WAITING = 20_000  # lines
_PAUSE = 0.2  # seconds between writes


class Log:
    """Writes events to a binary stream. Use it as a context manager; may be called from any thread."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._waiting: list[bytes] = []
        self._dropped = 0
        self._wake = threading.Event()
        self._stopping = False
        self._encode = msgspec.json.Encoder().encode
        self._thread = threading.Thread(target=self._write, name="edgeglm-log", daemon=True)

    def __enter__(self) -> Log:
        """Begin to write."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Write what waits, for a second at most."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=1)

    def event(self, level: str, event: str, fields: MutableMapping[str, Any] | None = None) -> None:
        """Log an event at once."""
        self._put({"time": round(time.time(), 6), "level": level, "event": event, **(fields or {})})
        self._wake.set()

    def request(
        self,
        scope: Mapping[str, Any],
        id_: bytes,
        status: int,
        seconds: float,
        error: BaseException | None,
    ) -> None:
        """Log a request over HTTP: ``info``, ``warning`` for a refusal, ``error`` for what we got wrong."""
        client = scope.get("client")
        entry = {
            "time": round(time.time(), 6),
            "level": "info",
            "event": "request",
            "id": id_.decode(),
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(seconds * 1e3, 3),
            "client": client[0] if client else "",
        }
        if error is not None:
            _describe(entry, error)
        self._put(entry)

    def call(
        self, method: str, id_: str, code: str, seconds: float, client: str, error: BaseException | None
    ) -> None:
        """Log a call over gRPC."""
        entry = {
            "time": round(time.time(), 6),
            "level": "info",
            "event": "call",
            "id": id_,
            "method": method,
            "code": code,
            "ms": round(seconds * 1e3, 3),
            "client": client,
        }
        if error is not None:
            _describe(entry, error)
        self._put(entry)

    def _put(self, entry: MutableMapping[str, Any]) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            self._dropped += 1
            return
        try:
            line = self._encode(entry)
        except UnicodeEncodeError:  # half a character, such as an error may quote
            line = self._encode({key: _plain(value) for key, value in entry.items()})
        self._waiting.append(line)

    def _write(self) -> None:
        while True:
            self._wake.wait(_PAUSE)
            self._wake.clear()
            lines, self._waiting = self._waiting, []
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                fields = {"level": "warning", "event": "log-lines-dropped", "lines": dropped}
                lines.append(self._encode({"time": round(time.time(), 6), **fields}))
            try:
                if lines:
                    self._stream.write(b"\n".join([*lines, b""]))
                    self._stream.flush()
            except (OSError, ValueError):
                return  # nobody reads any more: the server goes on
            if self._stopping and not self._waiting:
                return


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _describe(entry: MutableMapping[str, Any], error: BaseException) -> None:
    known = isinstance(error, EdgeglmError)
    entry["level"] = "warning" if known else "error"
    entry["error"] = str(error) if known else f"{type(error).__name__}: {error}"
    if not known:
        import traceback

        entry["trace"] = traceback.format_exception(type(error), error, error.__traceback__)[-8:]
