"""The table of deploy.py, as markdown."""

from __future__ import annotations

import statistics
from typing import Any


def page(found: dict[str, Any]) -> str:
    """Return the table as markdown."""
    median = statistics.median
    rows = []
    if wire := found.get("redeploy"):
        rows += [
            (
                wire,
                "redeploy, one tower changed: bytes on the wire over the tower's",
                f"{wire['moved_bytes']:,} over {wire['tower_bytes']:,}: {wire['over']:+.2%}",
                "+1 %",
            ),
            (
                wire,
                "redeploy, nothing changed: bytes on the wire",
                f"{wire['nothing_changed_bytes']:,} (first deploy {wire['first_bytes']:,})",
                "-",
            ),
        ]
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
        *found["notes"],
    ]
    return "\n".join([*lines, ""])


def made(part: dict[str, Any]) -> str:
    """Say at which commit, when, and beside how much other work."""
    load = part["load_average"]
    return f"{part['commit']}, {part['date']}" + ("" if load is None else f", load {load:.1f}")
