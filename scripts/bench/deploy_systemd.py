"""Deploying to a whole Debian under its own systemd: hardening, watchdog, rollback, kills, a power cut.

    .venv/bin/python scripts/bench/deploy_systemd.py --bundle BUNDLE --output docs/bench/deploy_systemd

Needs root, systemd-nspawn and mmdebstrap. Makes a Debian (or takes the one in ``--debian FOLDER``, which is
made there if it is not), boots it, and runs the real ``edgeglm`` commands against its SSH server: wheels,
finalize, the unit of the system and the server are those of a device. Each step holds what it finds; the
first that is not as it should be ends the bench. Writes deploy_systemd.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from deploy import digest_of, one_tower_changed, towers_of  # noqa: E402
from deploy_counters import children_seconds  # noqa: E402
from deploy_systemd_page import page  # noqa: E402
from deploy_systemd_sender import PORT, UNIT, Bench, hold, ready  # noqa: E402
from runner_report import commit_of  # noqa: E402

from scripts.fixtures.debian import debian, make_debian  # noqa: E402

ROUNDS = 7
DEVICE_ROOT = Path("/var/lib/edgeglm")
_WANTED = (Path("/etc/systemd/system/multi-user.target.wants", UNIT),)
_NEVER_READY_SECONDS = 5.0
# The real environment, finalize and supervisor; only the server that they start sleeps, or ends.
_NEVER = """#!/bin/sh
export PYTHONPATH=/opt/never
exec {python} "$@"
"""
_SITE = "import sys, time\nif 'serve' in sys.orig_argv:\n    {act}\n"


def first_deploy(bench: Bench, bundle: Path) -> dict[str, Any]:
    """Everything from nothing: wheels, environment, finalize, unit."""
    row, seconds = bench.deploy(bundle)
    hold(row["outcome"] == "done", f"the first deploy: {row['reason']}")
    hold(ready(), "the first deploy ended and nothing answers")
    return {
        "seconds": round(seconds, 1),
        "steps": row["delivered"]["seconds"],
        "sent_bytes": row["delivered"]["sent_bytes"],
        "chosen": row["delivered"]["chosen"],
        "unit": {name: bench.show(name) for name in ("Type", "ActiveState", "UnitFileState")},
    }


def hardening(bench: Bench) -> dict[str, Any]:
    """What holds of the server itself while it runs."""
    run, server, main = bench.machine.run, str(bench.state()["child"]), bench.show("MainPID")
    status = run("cat", f"/proc/{server}/status")
    inside = ["nsenter", "-t", server, "-m", "--"]

    def writes(path: str) -> bool:
        # As root, whom no permission stops: what refuses is the unit's view of the files.
        probe = shlex.join([*inside, "/bin/sh", "-c", f"touch {path}/probe && rm {path}/probe"])
        return run("sh", "-c", f"{probe} 2>/dev/null && echo yes", check=False) == "yes"

    group = bench.show("ControlGroup")
    places = (f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes", f"/sys/fs/cgroup{group}/memory.max")
    memory = run("cat", *places, check=False)
    exposure = run("systemd-analyze", "security", "--no-pager", UNIT, check=False)
    found: dict[str, Any] = {
        "user": int(_field(status, "Uid").split()[0]),
        "supervisor_user": int(_field(run("cat", f"/proc/{main}/status"), "Uid").split()[0]),
        "capabilities": int(_field(status, "CapEff"), 16),
        "no_new_privileges": _field(status, "NoNewPrivs") == "1",
        "system_calls_filtered": _field(status, "Seccomp") == "2",
        "writes": {path: writes(path) for path in ("/etc", "/usr", "/var/lib/edgeglm")},
        "in_homes": run(*inside, "/bin/ls", "-A", "/root", check=False).split(),
        "memory_limit_bytes": int(memory.split()[0]) if memory else None,
        "exposure": float(re.findall(r"exposure level for \S+: ([\d.]+)", exposure)[0]),
    }
    hold(found["user"] > 60_000 and found["supervisor_user"] == found["user"], "it runs as a user that stays")
    hold(found["capabilities"] == 0, "it has capabilities")
    hold(found["no_new_privileges"] and found["system_calls_filtered"], "system calls are not filtered")
    hold(not any(found["writes"].values()), f"it may write: {found['writes']}")
    hold(not found["in_homes"], f"it sees what is in a home: {found['in_homes']}")
    hold(memory, "its memory has no limit")
    return found


def _field(status: str, name: str) -> str:
    return next(line.partition(":")[2].strip() for line in status.splitlines() if line.startswith(f"{name}:"))


def stopped_server(bench: Bench) -> dict[str, Any]:
    """A server that answers nothing any more: how long until another one does."""
    before = bench.state()["child"]
    restarts = int(bench.show("NRestarts"))
    bench.machine.run("kill", f"-{signal.SIGSTOP.value}", str(before))

    def again() -> bool:
        return ready() and bench.state()["child"] != before

    seconds = bench.until(again, "another server")
    log = bench.machine.run("journalctl", "-u", UNIT, "-n", "60", "--no-pager", "-o", "cat")
    return {
        "seconds": round(seconds, 1),
        "restarts_by_systemd": int(bench.show("NRestarts")) - restarts,
        "watchdog_seconds": bench.show("WatchdogUSec"),
        "watchdog_told": "atchdog timeout" in log,
    }


def killed(bench: Bench, whom: str) -> dict[str, Any]:
    """``kill -9`` of the server or of its supervisor: how long until one answers again."""
    taken = []
    for _ in range(3):
        before = bench.state()
        number = before["child"] if whom == "server" else int(bench.show("MainPID"))
        bench.machine.run("kill", "-9", str(number))

        def again(old: int = before["child"]) -> bool:
            try:
                return bench.state()["child"] != old and ready()
            except (SystemExit, ValueError):
                return False

        taken.append(bench.until(again, f"a server after the {whom} was killed"))
    return {"seconds": [round(one, 2) for one in taken], "restarts_by_systemd": bench.show("NRestarts")}


def rollback(bench: Bench, bundle: Path, changed: Path) -> dict[str, Any]:
    """Seconds of the whole command, back and forth between two bundles."""
    row, seconds = bench.deploy(changed)
    hold(row["outcome"] == "done", f"the second deploy: {row['reason']}")
    walls, there, work = list[float](), list[float](), list[float]()
    digests = [digest_of(bundle), digest_of(changed)]
    for turn in range(ROUNDS + 2):  # the first two, one to each slot, compile what comes in
        used = children_seconds() + bench.machine.cpu_seconds()
        found, wall = bench.edgeglm("rollback", "device")
        used = children_seconds() + bench.machine.cpu_seconds() - used
        hold(bench.served() == digests[turn % 2], "after a rollback the former bundle does not answer")
        if turn > 1:
            walls.append(round(wall, 3))
            there.append(found[0]["answer"]["seconds"])
            work.append(round(used, 3))
    return {
        "redeploy_seconds": round(seconds, 1),
        "wall_seconds": walls,
        "switch_seconds": there,
        "cpu_seconds": work,
        "load_average": round(os.getloadavg()[0], 1),
    }


def never_ready(bench: Bench, bundle: Path, act: str) -> dict[str, Any]:
    """A bundle whose server never answers: the former one must serve again, by itself."""
    before = bench.served()
    environment = bench.machine.run("readlink", "-f", f"{DEVICE_ROOT}/current/environment")
    place = bench.machine.files / "opt/never"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(_SITE.format(act=act))
    (place / "python").write_text(_NEVER.format(python=f"{environment}/bin/python"))
    (place / "python").chmod(0o755)
    words = ("--python", "/opt/never/python", "--ready-seconds", _NEVER_READY_SECONDS)
    row, seconds = bench.deploy(bundle, *words, code=3)
    hold("the former one serves again" in row["reason"], f"nobody went back: {row['reason']}")
    hold(bench.served() == before, "the former bundle does not answer")
    hold(bench.show("ActiveState") == "active", "the unit is not active")
    return {"seconds": round(seconds, 1), "reason": row["reason"], "ready_seconds": _NEVER_READY_SECONDS}


def reboot(bench: Bench) -> dict[str, Any]:
    """From the word to the first answer."""
    before = bench.served()
    started = time.perf_counter()
    bench.machine.reboot()
    booted = time.perf_counter() - started
    bench.until(ready, "an answer after the reboot")
    answered = time.perf_counter() - started
    hold(bench.served() == before, "another bundle answers after the reboot")
    return {"booted_seconds": round(booted, 2), "answered_seconds": round(answered, 2)}


def power_cut(bench: Bench, bundle: Path) -> dict[str, Any]:
    """The plug pulled in the middle of a switch: what answers after the next boot, and the next deploy."""
    before, new = bench.served(), digest_of(bundle)
    journal = bench.machine.files / str(DEVICE_ROOT / "switching.json").lstrip("/")
    command = ["deploy", bundle, "device", "--port", PORT, "--any-board", "--retries", 0, "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "edgeglm.cli.main", *map(str, command)],
        env=bench.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as deploying:
        bench.until(journal.exists, "a switch")
        bench.machine.cut()
        said = json.loads(deploying.communicate()[0])["devices"][0]["reason"]
    hold("run the same command again" in said, f"a lost connection was told so: {said}")
    started = time.perf_counter()
    bench.machine.boot()
    bench.until(ready, "an answer after the cut")
    answered = time.perf_counter() - started
    between = bench.served()
    hold(between in (before, new), "after the cut neither the former nor the new bundle answers")
    row, seconds = bench.deploy(bundle)
    hold(row["outcome"] == "done" and bench.served() == new, f"the next deploy: {row['reason']}")
    return {
        "answered_seconds": round(answered, 2),
        "answers": "the new bundle" if between == new else "the former bundle",
        "next_deploy_seconds": round(seconds, 1),
        "next_deploy_files_sent": row["delivered"]["files_sent"],
    }


def removed(bench: Bench) -> dict[str, Any]:
    """Nothing of it is left."""
    _, seconds = bench.edgeglm("remove", "device")
    hold(bench.show("LoadState") == "not-found", "a unit is left")
    left = [path for path in (DEVICE_ROOT, Path("/etc/systemd/system", UNIT), Path("/run/edgeglm"))
            if bench.machine.run("sh", "-c", f"ls -d {path}", check=False)]  # fmt: skip
    hold(not left, f"{left} are left")
    return {"seconds": round(seconds, 2), "left": left}


def measured(bench: Bench, bundle: Path) -> dict[str, Any]:
    """Run every step, in an order in which each stands on what the former left."""
    name = next(iter(towers_of(bundle).values()))
    changed, _ = one_tower_changed(bundle, name, bench.work / "changed")
    other, _ = one_tower_changed(changed, list(towers_of(bundle).values())[-1], bench.work / "other")
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "first": lambda: first_deploy(bench, bundle),
        "hardening": lambda: hardening(bench),
        "server_killed": lambda: killed(bench, "server"),
        "supervisor_killed": lambda: killed(bench, "supervisor"),
        "rollback": lambda: rollback(bench, bundle, changed),
        "never_ready": lambda: never_ready(bench, other, "time.sleep(1e6)"),
        "ends": lambda: never_ready(bench, other, "sys.exit(3)"),
        "reboot": lambda: reboot(bench),
        "power_cut": lambda: power_cut(bench, other),
        "stopped": lambda: stopped_server(bench),
        "removed": lambda: removed(bench),
    }
    found = {}
    for step, run in steps.items():
        found[step] = run()
        print(step, json.dumps(found[step]), file=sys.stderr)  # noqa: T201
    return found


def main() -> None:
    """Run everything and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="A real bundle folder.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--debian", type=Path, help="Where the Debian lies or is made; else made for this run."
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the Debian is shut down, too
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="edgeglm-systemd-", dir="/var/tmp") as folder:
        work = Path(folder)
        files = (given.debian or work / "debian").resolve()
        make_debian(files)
        for left in (DEVICE_ROOT, Path("/etc/systemd/system", UNIT), *_WANTED):  # by a bench that was ended
            subprocess.run(["rm", "-rf", str(files / left.relative_to("/"))], check=True)
        key = work / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        with debian(files, key.with_suffix(".pub").read_text(), work / "boot.log") as machine:
            bench = Bench(work, machine, key)
            version = machine.run("systemctl", "--version").splitlines()[0]
            found = measured(bench, given.bundle.resolve())
    document = {
        "command": "python scripts/bench/deploy_systemd.py --bundle bundles/jetson-agx "
        "--output docs/bench/deploy_systemd",
        "commit": commit_of(ROOT),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} CPU cores that other work shared",
        "load_average": round(load, 1),
        "systemd": version,
        **found,
    }
    output = given.output.resolve()
    output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(document))


if __name__ == "__main__":
    main()
