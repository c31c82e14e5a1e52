"""How long work reports where it is. Rooms call this; only the command line draws it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Task(Protocol):
    """A running piece of work with a known or unknown length."""

    def advance(self, steps: float = 1) -> None:
        """Say that ``steps`` more steps are done."""

    def note(self, text: str) -> None:
        """Show a short text beside the bar, such as the current loss."""


class Progress(Protocol):
    """Where tasks are announced."""

    def task(self, description: str, total: float | None = None) -> AbstractContextManager[Task]:
        """Open a task; leaving the context closes it."""


class _QuietTask:
    def advance(self, steps: float = 1) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


class QuietProgress:
    """The progress of a program that nobody watches."""

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Open a task that shows nothing."""
        yield _QuietTask()


def track(progress: Progress, items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield ``items`` while advancing one task a step for each."""
    with progress.task(description, total) as task:
        for item in items:
            yield item
            task.advance()
