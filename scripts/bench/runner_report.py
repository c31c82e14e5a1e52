"""Rows of the runner's benchmark, and the page that they make."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measured_row import Row, measured_row
from runner_loads import QUIET, Rounds

PEERS = ("python -m venv PEERS", "PEERS/bin/pip install -r scripts/bench/serve-peers.txt")
CHANGED = ", changed"  # behind the commit of a tree that is not that commit


def row(
    name: str,
    unit: str,
    measured: Sequence[float],
    reach: float | None,
    beyond: float | None,
    note: str,
    rounds: Rounds,
) -> Row:
    """One line of the table, over the rounds that others disturbed least; see :func:`measured_row`."""
    return measured_row(
        name,
        unit,
        [measured[number] for number in rounds.best()],
        reach,
        beyond,
        note,
        rounds_tried=len(measured),
        others_cpu=rounds.others(),
    )


def check_publishable(root: Path, output: Path, *, allow_dirty: bool) -> None:
    """End the program where figures could not be written, or of a changed tree would be published."""
    if not output.absolute().parent.is_dir():
        raise SystemExit(f"there is no folder for {output}; give an --output in one that is there")
    published = (root / "docs").resolve() in output.resolve().parents
    if published and not allow_dirty and (commit := commit_of(root)).endswith(CHANGED):
        raise SystemExit(
            f"the code is not that of {commit.removesuffix(CHANGED)}; commit it, give an --output "
            "outside docs, or --allow-dirty"
        )


def commit_of(root: Path) -> str:
    """Return the commit of a checkout, and say so if its code, the pages of figures aside, is not that."""
    words = [
        subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        for command in (
            ("rev-parse", "--short", "HEAD"),
            ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/bench"),
        )
    ]
    return f"{words[0]}{CHANGED}" if words[1] else words[0]


def markdown(report: Mapping[str, Any], tried: Mapping[str, str]) -> str:
    """Write the report as a page. ``tried`` says of rows that fall short what was."""
    lines = [
        "# The runner beside its peers",
        "",
        f"Machine: {report['machine']}; Python {report['python']}, ONNX Runtime {report['onnxruntime']}.",
        "The runner's configuration is the default one, watchdog included; the engines that it is given have",
        "as many threads as noted, those of the other systems of a row as many. Medians of interleaved",
        "rounds, with the lowest and the highest round.",
        f"Rounds in which other work took over {QUIET:.0%} of all cores were made again, as long as time",
        "allowed; others' CPU is the most that it took in a round that counts.",
        "",
        "| what | median | rounds: low to high | reach | beyond | result | others' CPU | commit | notes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in report["rows"]:
        rounds = str(found["rounds"])
        if found["low"] is not None:
            rounds += f": {found['low']:g} to {found['high']:g}"
        sign = "<=" if found["unit"] == "us" else ">="
        reach, beyond = (
            "" if found[name] is None else f"{sign} {found[name]:g}" for name in ("reach", "beyond")
        )
        lines.append(
            f"| {found['name']} | {found['value']:g} | {rounds} "
            f"| {reach} | {beyond} | {found['result']} "
            f"| {found['others_cpu']:.0%} | {found['commit']} | {found['note']} |"
        )
    short = {found["name"] for found in report["rows"] if found["result"] == "falls short"}
    for name in sorted(short & tried.keys()):
        lines += ["", f"**{name}** falls short. {tried[name][0].upper()}{tried[name][1:]}"]
    for found in report["rows"]:
        for system, shares in found.get("p99_in_full_batch_calls", {}).items():
            text = ", ".join(f"{share}: {value:g}" for share, value in shares.items())
            lines += ["", f"p99 in full-batch calls at shares of the raw rate, {system}: {text}."]
    lines += ["", f"Made by `{report['command']}`; figures in `runner.json`. The peers' environment:", ""]
    lines += [f"    {line}" for line in PEERS]
    lines += [""]
    return "\n".join(lines)
