"""What libraries say, as lines of the server's log, which is one JSON object a line."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from edgeglm.serve.logs import Log


@contextmanager
def libraries_logged(log: Log) -> Iterator[None]:
    """Let ``logging``, from warnings upwards, and ``warnings`` end in the log and not as text on stderr."""
    root, handler = logging.getLogger(), _Handler(log)
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record; one that cannot be written must not take the request with it."""
        try:
            fields: dict[str, object] = {"logger": record.name, "message": record.getMessage().strip()}
            error = record.exc_info[1] if record.exc_info else None
            if error is not None:
                fields["error"] = f"{type(error).__name__}: {error}"
                fields["trace"] = traceback.format_exception(type(error), error, error.__traceback__)[-8:]
            level = "error" if record.levelno >= logging.ERROR else "warning"
            self._log.event(level, "library", fields)
        except Exception as error:
            self._log.event("error", "library", {"logger": record.name, "message": type(error).__name__})
