"""What TensorRT calls back: its log and its progress. Nothing raised here may cross into C++."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from edgeglm.compile.trt_api import BuilderConfig, TrtApi
from edgeglm.core.progress import Progress, Task
from edgeglm.engines.libraries import Library

_SEVERITIES = ("internal error", "error", "warning", "info")
"""TensorRT's severities by value; 4 is verbose and not kept."""


@dataclass
class BuildLog:
    """The lines of one build."""

    logger: Any
    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, severity: int, message: str) -> None:
        """Keep a line unless it is verbose."""
        if severity < len(_SEVERITIES):
            self.lines.append(f"[{_SEVERITIES[severity]}] {message}")
        if severity <= 1:
            self.errors.append(message)


# TensorRT keeps the first logger of a process while any of its objects lives, and ignores later
# ones. So there is one a library, and it passes lines to the build that holds the lock.
_lock = threading.RLock()
_loggers: dict[Library, Any] = {}
_current: list[BuildLog] = []


@contextmanager
def recorded_log(api: TrtApi) -> Iterator[BuildLog]:
    """Yield the log of one build. Builds in other threads wait."""
    with _lock:
        log = BuildLog(logger=_logger(api))
        _current.append(log)
        try:
            yield log
        finally:
            _current.pop()


def _logger(api: TrtApi) -> Any:
    if api.library not in _loggers:

        class Recorder(api.module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                api.module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if _current:
                    _current[-1].add(int(severity.value), message)

        _loggers[api.library] = Recorder()
    return _loggers[api.library]


class BuildWatch:
    """Shows the builder's top phase as a task, and lets Ctrl-C stop a build.

    Source: ``IProgressMonitor`` in NVIDIA's TensorRT Python API reference.
    """

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._description = description
        self._task: Task | None = None
        self._top: str | None = None
        self._interrupt: BaseException | None = None

    @contextmanager
    def attached(self, api: TrtApi, config: BuilderConfig) -> Iterator[None]:
        """Watch one build through ``config``; raise afterwards what a callback had to swallow."""
        steps = 6  # of the phase "Building engine"; the builder corrects nothing if this is off
        with self._progress.task(self._description, steps) as task:
            self._task = task
            monitor = self._monitor(api) if hasattr(api.module, "IProgressMonitor") else None
            if monitor is not None:
                config.progress_monitor = monitor
            try:
                yield
            finally:
                if monitor is not None:
                    config.progress_monitor = None
        if self._interrupt is not None:
            raise self._interrupt

    def phase(self, name: str, parent: str | None) -> None:
        """Note the phase that began."""
        if parent is None:
            self._top = name
        elif self._task is not None:
            self._task.note(name)

    def step(self, name: str) -> bool:
        """Advance for a step of the top phase; False asks the builder to stop."""
        if self._interrupt is not None:
            return False
        if name == self._top and self._task is not None:
            self._task.advance()
        return True

    def swallow(self, error: BaseException) -> None:
        """Keep an error that arose inside a callback, to be raised after the build."""
        self._interrupt = self._interrupt or error

    def _monitor(self, api: TrtApi) -> Any:
        watch = self

        class Monitor(api.module.IProgressMonitor):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                api.module.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                try:
                    watch.phase(phase_name, parent_phase)
                except BaseException as error:  # KeyboardInterrupt arrives here too
                    watch.swallow(error)

            def step_complete(self, phase_name: str, step: int) -> bool:
                try:
                    return watch.step(phase_name)
                except BaseException as error:
                    watch.swallow(error)
                    return False

            def phase_finish(self, phase_name: str) -> None:
                """Nothing to show: the next phase says where we are."""

        return Monitor()
