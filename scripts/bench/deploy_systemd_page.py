"""The page of deploy_systemd.py, as markdown. Its figures are those of the document."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any


def page(found: dict[str, Any]) -> str:
    """Return the page."""
    first, back, hard = found["first"], found["rollback"], found["hardening"]
    silent, ends, cut = found["never_ready"], found["ends"], found["power_cut"]
    stopped, boot = found["stopped"], found["reboot"]
    median = statistics.median
    steps = ", ".join(f"{name} {seconds:g} s" for name, seconds in first["steps"].items())
    memory = f"{hard['memory_limit_bytes'] / 1e9:.1f} GB"
    rows = [
        ("first deploy: wheels, environment, finalize, unit", f"{first['seconds']} s ({steps})", "-"),
        (
            f"`edgeglm rollback`, median of {len(back['wall_seconds'])}",
            f"{median(back['wall_seconds']):.2f} s ({median(back['cpu_seconds']):.2f} s of CPU at both ends; "
            f"the switch {median(back['switch_seconds']):.2f} s) beside a load of {back['load_average']}",
            "2 s",
        ),
        (
            f"a server that never answers, told to be waited for {silent['ready_seconds']:g} s",
            f"the former one serves again; the whole deploy {silent['seconds']} s",
            "by itself",
        ),
        ("a server that ends at once", f"the same, {ends['seconds']} s", "by itself"),
        (
            "`kill -STOP` of the server",
            f"another one answers after {stopped['seconds']} s, by systemd's watchdog "
            f"({stopped['watchdog_seconds']})",
            "by itself",
        ),
        ("`kill -9` of the server, three times", _seconds(found["server_killed"]), "by itself"),
        ("`kill -9` of its supervisor, three times", _seconds(found["supervisor_killed"]), "by itself"),
        (
            "reboot, to the first answer",
            f"{boot['answered_seconds']} s, of which {boot['booted_seconds']} s until Debian had started",
            "serves",
        ),
        (
            "power cut in the middle of a switch",
            f"{cut['answers']} answers {cut['answered_seconds']} s after power came back; the same command "
            f"again ends the deploy, {cut['next_deploy_files_sent']} files sent",
            "serves",
        ),
        ("`edgeglm remove`", f"{found['removed']['seconds']} s, nothing left", "nothing left"),
    ]
    lines = [
        "# Deploying to a Debian under its own systemd",
        "",
        *_filled(
            f"Made by `{found['command']}` at {found['commit']}, {found['date']}, on {found['machine']} "
            f"(load {found['load_average']}). {found['systemd'].capitalize()} as process 1 of a whole Debian "
            "12 in systemd-nspawn, with its own SSH server; kernel and processors are the host's, so times "
            "are this machine's and no board's. Nothing stands in for anything: the wheels of the lock, the "
            "environment, finalize, the unit of the system, the supervisor and the server are real."
        ),
        "",
        "| what | measured | aim |",
        "| --- | --- | --- |",
        *(f"| {what} | {measured} | {aim} |" for what, measured, aim in rows),
        "",
        *_filled(
            "In effect on the running server, read from the kernel and by trying: a user that exists only "
            f"while it runs ({hard['user']}), no capability, no new privileges, system calls filtered, "
            f"nothing in {', '.join(hard['writes'])} to be written even by root, no home to be seen, memory "
            f"limited to {memory} by its control group. `systemd-analyze security`: {hard['exposure']} "
            "(0 is shut)."
        ),
        "",
        *_filled(
            "The server that never answers and the one that ends run from the real environment, with a "
            "`sitecustomize` that makes only `edgeglm serve` sleep or end. A killed server is started again "
            "by its supervisor, after a pause that doubles; a killed supervisor by systemd, which takes the "
            "server along. A stopped server's supervisor would end it, too, after 45 s and the 40 s that "
            "it may take to answer what it holds: the watchdog comes first."
        ),
        "",
    ]
    return "\n".join(lines)


def _filled(text: str) -> list[str]:
    return textwrap.fill(text, 110, break_on_hyphens=False).splitlines()


def _seconds(step: dict[str, Any]) -> str:
    return "answers again after " + ", ".join(f"{one:g}" for one in step["seconds"]) + " s"
