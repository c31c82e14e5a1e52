"""Progress for a program that reads it: a JSON object a line, on stderr, under ``EDGEGLM_PROGRESS=lines``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import click

from edgeglm.core.progress import Task


class LinesProgress:
    """Writes ``{"task", "done", "total", "note"}`` whenever one of them changes."""

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Open a task; its end is not announced, the next one's begin says as much."""
        yield _Line(description, total)


class _Line:
    def __init__(self, description: str, total: float | None) -> None:
        self._words: dict[str, object] = {"task": description, "done": 0.0, "total": total, "note": ""}
        self._done = 0.0
        self._say()

    def advance(self, steps: float = 1) -> None:
        self._done += steps
        self._say(done=self._done)

    def note(self, text: str) -> None:
        self._say(note=text)

    def _say(self, **changed: object) -> None:
        self._words.update(changed)
        click.echo(json.dumps(self._words), err=True)
