"""The table of deploy.py, as markdown."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any


def page(found: dict[str, Any]) -> str:
    """Return the table as markdown."""
    median = statistics.median
    rows = []
    if wire := found.get("redeploy"):
        rows += [
            (
                wire,
                f"redeploy, {tower} changed: bytes on the wire over the tower's",
                f"{one['moved_bytes']:,} over {one['tower_bytes']:,}: {one['over']:+.2%}",
                "+1 %",
            )
            for tower, one in towers_in(wire).items()
        ]
        rows.append(
            (
                wire,
                "redeploy, nothing changed: bytes on the wire",
                f"{wire['nothing_changed_bytes']:,} (first deploy {wire['first_bytes']:,})",
                "-",
            )
        )
    if back := found.get("rollback"):
        what = "`edgeglm rollback`" if back["whole_command"] else "rollback, without the command's start"
        rows.append(
            (
                back,
                f"{what}, real server, median of {len(back['wall_seconds'])}",
                f"{median(back['wall_seconds']):.2f} s ({median(back['cpu_seconds']):.2f} s of CPU; "
                f"the switch on the device {median(back['switch_seconds']):.2f} s)",
                "2 s",
            )
        )
    for row in found.get("twenty", {}).get("rows", ()):
        took = f"{median(row['ratios']):.2f}x ({median(row['twenty']):.1f} s, {median(row['one']):.1f} s"
        if work := row.get("sender_cpu_seconds"):
            others = median(row["devices_cpu_seconds"])
            took += f"; CPU of the sender {median(work):.1f} s, of the twenty {others:.1f} s"
        what = f"twenty devices over one, stand-ins, finalize {row['finalize_seconds']:g} s"
        rows.append((found["twenty"], f"{what}, median of {len(row['ratios'])}", f"{took})", "3x"))
    if real := found.get("real"):
        rows.append(
            (
                real,
                "twenty devices over one, first deploy of the real bundle, all on these cores",
                f"{real['ratio']:.2f}x ({real['twenty']:.1f} s, {real['one']:.1f} s; "
                f"finalize {real['finalize_seconds'][1]:.1f} s, {real['finalize_seconds'][0]:.1f} s)",
                "3x",
            )
        )
    if cut := found.get("cuts"):
        rows.append(
            (
                cut,
                f"cut at {len(cut['points'])} random points: served after it, completed by the next run",
                f"{cut['served']} and {cut['completed']}",
                f"{len(cut['points'])} and {len(cut['points'])}",
            )
        )
    if secret := found.get("secrets"):
        rows.append(
            (
                secret,
                f"secrets on {secret['command_lines']} command lines, {secret['samples']} looks; in output; "
                "in files (logs, summary, store, device)",
                f"{secret['on_command_lines']}, {secret['in_output']}, {secret['in_files']}",
                "0, 0, 0",
            )
        )
    lines = [
        "# Deploying over loopback",
        "",
        f"Made by `{found['command']}` on {found['machine']}.",
        "OpenSSH's server on loopback. Bytes are counted between client and server, both ways, SSH's own",
        "included. Real commands run at both ends, but for the rows of stand-ins and cuts, in which finalize",
        "and the server of the device are stand-ins. Each row has its commit, its day",
        "and the load on the cores before it.",
        "",
        "| what | measured | aim | made |",
        "| --- | ---: | ---: | --- |",
        *(f"| {what} | {measured} | {aim} | {made(part)} |" for part, what, measured, aim in rows),
        "",
        *notes(found),
    ]
    return "\n".join([*lines, ""])


def towers_in(wire: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what was measured of each tower; the largest alone, where no other was measured."""
    if "towers" in wire:
        return {f"the {tower} tower": one for tower, one in wire["towers"].items()}
    return {"the largest tower": wire}


def notes(found: dict[str, Any]) -> list[str]:
    """Return what falls short and what was tried. Its figures are those of the rows."""
    texts = []
    for row in found.get("twenty", {}).get("rows", ()):
        if row["finalize_seconds"] == 0 and row.get("sender_cpu_seconds"):
            texts.append(_twenty(row))
    if found.get("rollback"):
        texts.append(_ROLLBACK)
    if wire := found.get("redeploy"):
        size = f" ({wire['device_side_bytes'] / 1e3:.0f} kB)" if "device_side_bytes" in wire else ""
        texts.append(_REDEPLOY.format(size=size))
    return "\n\n".join(textwrap.fill(text, 110, break_on_hyphens=False) for text in texts).splitlines()


_ROLLBACK = """\
**Rollback.** What was tried and kept: the server that comes back imports while the other one ends, and opens
its models after that; asyncssh without a search for libraries that starts a compiler; the board is described
while the server starts; no megabyte is cleared for each of many small files; no garbage collection before the
first answer. Tried and left: verifying beside the imports, which gave nothing on two threads of one core. Not
done: loading the new models beside the old ones, as a board that is out of memory is what a rollback must not
cause. Shared cores differ from themselves by the hour: compare rows of one run.
"""
_REDEPLOY = """\
The device's side of edgeglm{size} moves with the first deploy and when it has changed: a device keeps it.
What a redeploy moves besides the tower is SSH's key exchange and packets, the changed lines of the manifest,
the bill of materials, and receipt, logs and progress on their way back, deflated.
"""


def _twenty(row: dict[str, Any]) -> str:
    names = ("sender_cpu_seconds", "devices_cpu_seconds", "one")
    sender, devices, one = (statistics.median(row[name]) for name in names)
    return (
        "**Twenty over one with no time on the devices.** Then all that is measured is this machine's cores "
        "running twenty key exchanges, twenty agents, finalizes, supervisors and servers: "
        f"{devices:.1f} s of CPU, which boards would work on processors of their own, beside {sender:.1f} s "
        f"of the sender, {sender / 20:.2f} s a device; a device alone takes {one:.1f} s. With seconds of "
        "work on each device, less than a board takes to build one engine, the ratio is that of the next "
        "row. Of the real bundle, whose finalize verifies, times and tests on these two cores, twenty take "
        "what twenty take one after the other: no fan-out shares a core. Kept: the event loop is let go "
        "between chunks "
        "of an upload; what the sender's store and inventory sync is synced beside it; with `--python` no "
        "interpreter is started only to ask whether edgeglm is there; readiness is asked for without "
        "http.client."
    )


def made(part: dict[str, Any]) -> str:
    """Say at which commit, when, and beside how much other work."""
    load = part["load_average"]
    return f"{part['commit']}, {part['date']}" + ("" if load is None else f", load {load:.1f}")
