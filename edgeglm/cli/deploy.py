"""`edgeglm deploy`: a bundle onto devices, over SSH."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from edgeglm.cli.console import App, json_option, trust_options
from edgeglm.core.words import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from edgeglm.deploy.options import DeployOptions
    from edgeglm.deploy.summary import FleetPlan, Summary

    Replayed = TypeVar("Replayed", DeployOptions, FleetPlan)

_STYLES = {"done": "green", "failed": "bold red", "skipped": "yellow", "waiting": "dim"}
_ENDED = ("failed", "skipped")
_ORDER = {"failed": 1, "waiting": 2, "skipped": 3, "done": 4}
"""Which devices are shown first where not all fit: those at work, then these."""
_AROUND_TABLE = 6  # lines of the heading, the caption, and what stood there before
_PATH = click.Path(path_type=Path)
_PORT = click.IntRange(0, 65_535)


class FiniteRange(click.FloatRange):
    """A number that can be waited for and compared with: neither infinite nor nan."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return it. Ends the command for any other."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


SECONDS = FiniteRange(min=0)


def root_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--root``."""
    text = "Where edgeglm lies on the device; by default what was used before, or the user's data folder."
    return click.option("--root", help=text)(command)


@click.command(name="deploy")
@click.argument("bundle", type=_PATH, required=False)
@click.argument("devices", nargs=-1)
@click.option("--parallel", default=20, show_default=True, type=click.IntRange(min=1), help="At a time.")
@click.option("--canary", default=1, show_default=True, type=click.IntRange(min=0), help="So many go first.")
@click.option("--max-failures", default=1, show_default=True, type=click.IntRange(min=1), help="Then stop.")
@click.option(
    "--retries", default=1, show_default=True, type=click.IntRange(min=0), help="Of a lost connection."
)
@click.option("--reference", type=_PATH, help="Folder with pairs.jsonl: mAP@10 there must not fall.")
@click.option("--tolerance", default=0.0, show_default=True, type=FiniteRange(), help="How much it may fall.")
@click.option("--stage", is_flag=True, help="Finalize it in the spare slot, and do not serve it.")
@click.option("--service", type=click.Choice(["auto", "system", "user", "cron", "process"]), default="auto")
@click.option("--python", help="An interpreter on the device that has edgeglm; nothing is then installed.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on there.")
@click.option("--port", default=8000, show_default=True, type=_PORT, help="HTTP port; 0 for a free one.")
@click.option("--serve-flag", "serve_flags", multiple=True, help="A further word for edgeglm serve.")
@click.option("--ready-seconds", default=120.0, show_default=True, type=SECONDS, help="Until it must answer.")
@click.option(
    "--lock-seconds", default=20.0, show_default=True, type=SECONDS, help="To wait for another deployer."
)
@click.option("--engine", type=click.Choice(["auto", "native", "onnxruntime"]), default="auto")
@click.option("--any-board", is_flag=True, help="Go on although the board is outside the target.")
@click.option("--any-clock", is_flag=True, help="Go on although the device's clock is off.")
@click.option("--summary", "summary_path", type=_PATH, help="Write what became of each device here.")
@click.option(
    "--replay", type=_PATH, help="Do what such a summary left undone; what is given besides overrides it."
)
@root_option
@trust_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path | None,
    devices: tuple[str, ...],
    parallel: int,
    canary: int,
    max_failures: int,
    retries: int,
    reference: Path | None,
    tolerance: float,
    stage: bool,
    service: str,
    python: str | None,
    host: str,
    port: int,
    serve_flags: tuple[str, ...],
    ready_seconds: float,
    lock_seconds: float,
    engine: str,
    any_board: bool,
    any_clock: bool,
    summary_path: Path | None,
    replay: Path | None,
    root: str | None,
) -> None:
    """Bring BUNDLE onto each of DEVICES (user@host), finalize it there, judge it, and serve it.

    Only what is missing travels. The bundle goes into the slot that does not serve; a switch follows only
    after its golden outputs were right there, and is undone by itself when the server never gets ready.
    """
    from edgeglm.cli.serve_flags import check_serve_flags
    from edgeglm.deploy.hosts import hosts_from_texts
    from edgeglm.deploy.options import DeployOptions
    from edgeglm.deploy.session import deployed
    from edgeglm.deploy.summary import FleetPlan, still_to_do, summary_from_file

    app = ctx.ensure_object(App)
    digest = None
    plan = FleetPlan(parallel=parallel, canary=canary, max_failures=max_failures, retries=retries)
    options = DeployOptions(
        root=root,
        service=service,
        python=python,
        host=host,
        port=port,
        serve_flags=serve_flags,
        activate=not stage,
        ready_seconds=ready_seconds,
        lock_seconds=lock_seconds,
        tolerance=tolerance,
        any_board=any_board,
        any_clock=any_clock,
        allow_unsigned=app.allow_unsigned,
        allow_downgrade=app.allow_downgrade,
        engine=engine,
    )
    if replay is not None:
        if bundle is not None or devices:
            raise click.UsageError("--replay takes bundle and devices from the summary; name neither")
        former = summary_from_file(replay)
        given = _given(ctx)
        bundle, hosts = Path(former.bundle), still_to_do(former)
        options, plan = _overridden(former.options, options, given), _overridden(former.plan, plan, given)
        if reference is None and former.reference is not None:
            reference = Path(former.reference)
        digest = former.content_digest
    elif bundle is None:
        raise click.UsageError("give a bundle and at least one device, or --replay SUMMARY")
    else:
        hosts = hosts_from_texts(devices)
    check_serve_flags(options.serve_flags)
    with live_table(app) as on_change:
        summary = deployed(
            bundle,
            hosts,
            options,
            plan,
            app.store(),
            on_change,
            reference=reference,
            summary_path=summary_path,
            content_digest=digest,
        )
    print_rows(app, summary)
    if summary_path is not None and any(one.outcome != "done" for one in summary.devices):
        app.note(f"for what is left: edgeglm deploy --replay {summary_path}")
    app.emit(summary)
    if summary.exit_code:
        ctx.exit(summary.exit_code)


def _given(ctx: click.Context) -> set[str]:
    """Return the fields of the options and of the plan that the command line itself sets."""
    here = ParameterSource.COMMANDLINE
    names = {name for name in ctx.params if ctx.get_parameter_source(name) is here}
    app = ctx.ensure_object(App)
    trust = ("allow_unsigned", "allow_downgrade")
    return {"activate" if name == "stage" else name for name in names} | {t for t in trust if getattr(app, t)}


def _overridden(former: Replayed, new: Replayed, given: set[str]) -> Replayed:
    """Return what a summary says, but for what is given now."""
    import msgspec

    return msgspec.structs.replace(
        former, **{n: getattr(new, n) for n in new.__struct_fields__ if n in given}
    )


def print_rows(app: App, summary: Summary) -> None:
    """Print one row a device, and below them each reason once, however many devices share it."""
    rows, reasons = [], dict[str, list[str]]()
    for one in summary.devices:
        done = one.delivered
        took = f"{sum(done.seconds.values()):.1f} s" if done else "-"
        runs = f"{done.chosen}, {done.evidence}" if done else "-"
        where = (done.url or f"staged in slot {done.slot}") if done else "-"
        rows.append(
            (one.device, one.outcome, took, human_bytes(done.sent_bytes) if done else "-", runs, where)
        )
        if one.reason:
            reasons.setdefault(f"{one.outcome}: {one.reason}", []).append(one.device)
        if done and done.dropped:
            words = shlex.join(done.dropped)
            told = f"is served otherwise than before; deploy again with {words} to keep that"
            reasons.setdefault(told, []).append(one.device)
    app.table(["device", "outcome", ">time", ">sent", "runs", "serves at"], rows)
    for reason, names in reasons.items():
        app.print(f"{', '.join(names)} {reason}")
    count = sum(one.outcome == "done" for one in summary.devices)
    app.print(f"{count} of {len(summary.devices)} devices done in {summary.seconds:.1f} s")


@contextmanager
def live_table(app: App) -> Iterator[Callable[[str, str, str], None]]:
    """Yield what keeps a live table of all devices; off a terminal, one line for each new state.

    Why one failed is told by ``print_rows``, once.
    """
    rows: dict[str, tuple[str, str]] = {}
    screen = app.console.err
    if app.json or not screen.is_terminal:

        def line(name: str, state: str, note: str) -> None:
            if rows.get(name, ("", ""))[0] != state:
                rows[name] = (state, note)
                told = "" if state in _ENDED else note
                app.note(f"{name}: {state}{f': {told}' if told else ''}")

        yield line
        return
    from rich.live import Live

    with Live(
        console=screen,
        refresh_per_second=8,
        transient=True,
        get_renderable=lambda: device_table(rows, screen.height - _AROUND_TABLE),
    ):

        def row(name: str, state: str, note: str) -> None:
            rows[name] = (state, note)

        yield row


def device_table(rows: Mapping[str, tuple[str, str]], height: int) -> Table:
    """Return a table of (state, note) by device, a line each; those at work, if not all fit in ``height``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for heading in ("device", "state", ""):
        shown.add_column(heading, no_wrap=True, overflow="ellipsis")
    names = list(rows)
    if len(names) > height:
        names.sort(key=lambda name: _ORDER.get(rows[name][0], 0))
        count = Counter(state if state in _ORDER else "at work" for state, _ in rows.values())
        shown.caption = ", ".join(f"{number} {state}" for state, number in count.items())
    for name in names[: max(height, 1)]:
        state, note = rows[name]
        shown.add_row(name, Text(state, style=_STYLES.get(state, "")), note)
    return shown
