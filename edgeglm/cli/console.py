"""The one place that writes to the terminal: results to stdout, progress and notes to stderr."""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeglm.core.progress import Progress, QuietProgress, Task

if TYPE_CHECKING:  # rich costs 60 ms that `edgeglm --help` does not have
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

    from edgeglm.bundle.trust import Trust
    from edgeglm.core.store import Store

F = TypeVar("F", bound=Callable[..., Any])

_PIPE_WIDTH = 160  # columns when nobody's terminal sets them: wide enough for a path
_WRAPPED = 24  # what a column of long text needs at the least, to be read at all


class Console:
    """Two rich consoles, stdout and stderr, and the bars that may be live on the second."""

    @cached_property
    def out(self) -> RichConsole:
        """The console of results."""
        return _rich_console(stderr=False)

    @cached_property
    def err(self) -> RichConsole:
        """The console of progress and notes."""
        return _rich_console(stderr=True)

    @cached_property
    def progress(self) -> RichProgress:
        """The bars; all tasks share them."""
        return RichProgress(self.err)

    def print(self, *parts: Any) -> None:
        """Print results. While bars are live on the same screen, print above them."""
        live = self.progress.live and self.out.is_terminal
        # A program that reads a line gets the whole of it; tables are cut into parts by whoever makes them.
        whole = not self.out.is_terminal and all(isinstance(part, str) for part in parts)
        (self.err if live else self.out).print(*parts, soft_wrap=whole)

    def note(self, text: str) -> None:
        """Print a remark that is no result."""
        self.err.print(text, style="dim", soft_wrap=not self.err.is_terminal)


class RichProgress:
    """Bars with rate and remaining time; off a terminal, one line for each finished outermost task."""

    def __init__(self, console: RichConsole) -> None:
        self._console = console
        self._lock = Lock()
        self._bars: RichBars | None = None
        self._open = 0

    @property
    def live(self) -> bool:
        """Whether bars are on the screen now."""
        return self._bars is not None

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Open a task; the last one to close takes the bars off the screen."""
        started = time.perf_counter()
        bars = self._entered()
        try:
            if bars is None:
                line = _LineTask()
                yield line
                if self._open == 1:
                    done = f"{line.done:,.0f} steps in " if line.done > 1 else ""
                    self._console.print(f"{description}: {done}{time.perf_counter() - started:.1f} s")
            else:
                identity = bars.add_task(description, total=total, text="")
                try:
                    yield _BarTask(bars, identity)
                finally:
                    bars.remove_task(identity)
        finally:
            self._left()

    def _entered(self) -> RichBars | None:
        with self._lock:
            self._open += 1
            if self._open == 1 and self._console.is_terminal:
                self._bars = _bars(self._console)
                self._bars.start()
            return self._bars

    def _left(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


class _LineTask:
    done = 0.0

    def advance(self, steps: float = 1) -> None:
        self.done += steps

    def note(self, text: str) -> None:
        """Say nothing: a log has no place beside a bar."""


class _BarTask:
    def __init__(self, bars: RichBars, identity: TaskID) -> None:
        self._bars = bars
        self._identity = identity

    def advance(self, steps: float = 1) -> None:
        self._bars.advance(self._identity, steps)

    def note(self, text: str) -> None:
        self._bars.update(self._identity, text=text)


@dataclass(frozen=True, kw_only=True)
class App:
    """What every command gets as ``ctx.obj``. Frozen: ``--json`` makes a changed copy."""

    json: bool = False
    console: Console = field(default_factory=Console)
    allow_unsigned: bool = False
    allow_downgrade: bool = False
    _stores: dict[Path, Store] = field(default_factory=dict, repr=False)

    @property
    def progress(self) -> Progress:
        """Where long work reports: nowhere under ``--json``, unless a program asked for lines."""
        if os.environ.get("EDGEGLM_PROGRESS") == "lines":
            from edgeglm.cli.progress_lines import LinesProgress

            return LinesProgress()
        return QuietProgress() if self.json else self.console.progress

    def store(self) -> Store:
        """Open the user's store, once a command: what it gave is held as long as it lives.

        Raises UserError when its place cannot be written.
        """
        from edgeglm.core.store import Store, default_store_root

        root = default_store_root()
        if root not in self._stores:
            self._stores[root] = Store(root)
        return self._stores[root]

    def trust(self) -> Trust:
        """Return whose bundles this machine takes, as far as the user's flags do not widen it."""
        from edgeglm.bundle.trust import trust_here

        return trust_here(allow_unsigned=self.allow_unsigned, allow_downgrade=self.allow_downgrade)

    def print(self, *parts: Any) -> None:
        """Print for a person; nothing under ``--json``."""
        if not self.json:
            self.console.print(*parts)

    def note(self, text: str) -> None:
        """Remark on stderr; nothing under ``--json``."""
        if not self.json:
            self.console.note(text)

    def emit(self, value: Any) -> None:
        """Write one JSON document to stdout under ``--json``; nothing otherwise."""
        if self.json:
            # JSON is UTF-8, whatever the locale.
            escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
            click.echo(json.dumps(value, indent=2, ensure_ascii=escaped, allow_nan=False, default=_plain))

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
        """Print rows under headings; a heading that starts with ``>`` is right-aligned."""
        if self.json:
            return
        from rich import box
        from rich.table import Table

        texts = [[str(cell) for cell in row] for row in rows]
        for number, columns in enumerate(_columns_that_fit(headings, texts, self.console.out.width)):
            shown = title if not number else ""
            table = Table(box=box.SIMPLE_HEAD, title=shown or None, title_justify="left", pad_edge=False)
            for heading in (headings[column] for column in columns):
                right = heading.startswith(">")
                table.add_column(heading.lstrip(">"), justify="right" if right else "left", overflow="fold")
            for row in texts:
                table.add_row(*(row[column] for column in columns))
            self.console.print(table)

    def pairs(self, rows: Iterable[tuple[str, str]], *, title: str = "") -> None:
        """Print labels with their values; a label that repeats is shown once."""
        if self.json:
            return
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.title, table.title_justify = title or None, "left"
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        before = None
        for label, value in rows:
            table.add_row("" if label == before else label, value)
            before = label
        self.console.print(table)


def bundle_argument(command: F) -> F:
    """Give a command the argument BUNDLE, passed as the path ``bundle``."""
    return click.argument("bundle", type=click.Path(path_type=Path))(command)


def json_option(command: F) -> F:
    """Give a command ``--json``, which turns ``ctx.obj`` into an App that prints JSON only."""

    def switch(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.obj = dataclasses.replace(ctx.ensure_object(App), json=True)

    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=switch,
        help="Print one JSON document and nothing else.",
    )(command)


def trust_options(command: F) -> F:
    """Give a command ``--allow-unsigned`` and ``--allow-downgrade``, which ``App.trust`` heeds."""

    def switch(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        app = ctx.ensure_object(App)
        if value and parameter.name == "allow_unsigned":
            ctx.obj = dataclasses.replace(app, allow_unsigned=True)
        elif value:
            ctx.obj = dataclasses.replace(app, allow_downgrade=True)

    for name, text in (
        ("--allow-downgrade", "Take a bundle older than the one that was finalized here before."),
        ("--allow-unsigned", "Take a bundle that no trusted key has signed."),
    ):
        option = click.option(name, is_flag=True, expose_value=False, callback=switch, help=text)
        command = option(command)
    return command


def _columns_that_fit(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Return which columns to print together: all of them, or parts of which each begins with the first.

    A column of long text may wrap, so it counts with ``_WRAPPED`` characters at most.
    """
    widths = [
        min(_WRAPPED, max(len(text) for text in (heading.lstrip(">"), *(row[column] for row in rows)))) + 3
        for column, heading in enumerate(headings)
    ]
    parts = [[0]]
    for column in range(1, len(headings)):
        if len(parts[-1]) > 1 and sum(widths[c] for c in parts[-1]) + widths[column] > width:
            parts.append([0])
        parts[-1].append(column)
    return parts


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    import msgspec

    return msgspec.to_builtins(value)


def _rich_console(*, stderr: bool) -> RichConsole:
    from rich.console import Console as RichConsole

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    # Names of files and concepts may hold brackets and colons: nothing in them is markup.
    return RichConsole(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def _bars(console: RichConsole) -> RichBars:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichBars
    from rich.progress import Task as RichTask
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            """Show steps a second, once there are any."""
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.1f}/s" if speed else "", style="dim")

    return RichBars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", style="dim"),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
