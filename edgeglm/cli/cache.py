"""`edgeglm cache`: the store of finished work."""

from __future__ import annotations

import re
import time

import click

from edgeglm.cli.console import App, json_option
from edgeglm.core.errors import UserError
from edgeglm.core.words import ago, human_bytes

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


@click.group(name="cache")
def command() -> None:
    """List the store of finished work, or make room in it.

    The store lies at $EDGEGLM_STORE, else in the user's cache folder. Removing an entry loses no
    more than the time to make it again.
    """


@command.command(name="list")
@json_option
@click.pass_obj
def list_entries(app: App) -> None:
    """List the entries, the longest unused first."""
    store = app.store()
    entries = store.entries()
    now = time.time()
    total = sum(entry.size_bytes for entry in entries)
    rows = [
        (entry.kind, entry.key[:12], human_bytes(entry.size_bytes), ago(now - entry.last_used))
        for entry in entries
    ]
    app.table(["kind", "key", ">size", ">last used"], rows)
    app.print(f"{len(entries)} entries, {human_bytes(total)} in {store.root}")
    app.emit({"root": store.root, "size_bytes": total, "entries": entries})


@command.command(name="gc")
@click.option(
    "--quota", metavar="SIZE", help="Keep at most this much, such as 5GB or 500MB. [default: 20GiB]"
)
@json_option
@click.pass_obj
def collect(app: App, quota: str | None) -> None:
    """Remove the longest unused entries until the rest fits the quota.

    What a running command works with stays, and so does what devices sent home.
    """
    store = app.store()
    limit = store.quota_bytes if quota is None else size_in_bytes(quota)
    removed = store.collect(quota_bytes=limit)
    freed = sum(entry.size_bytes for entry in removed)
    left = sum(entry.size_bytes for entry in store.entries())
    app.print(f"removed {len(removed)} entries, freed {human_bytes(freed)}")
    if left > limit:
        app.note(f"{human_bytes(left)} are left, which running commands work with or devices sent home")
    app.emit({"removed": removed, "freed_bytes": freed, "left_bytes": left})


@command.command(name="path")
@json_option
@click.pass_obj
def show_path(app: App) -> None:
    """Print the store's folder."""
    root = app.store().root
    app.print(str(root))
    app.emit({"root": root})


def size_in_bytes(text: str) -> int:
    """Parse ``5GB``, ``1.5 GiB`` or ``1000``; GB is 1000**3 bytes, GiB is 1024**3."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise UserError(f"cannot read the size {text!r}; write it like 5GB or 500MB")
    unit = match[2].upper()
    base = 1024 ** "KMGT".index(unit) * 1024 if match[3] else _UNITS[unit]
    return int(float(match[1]) * base)
