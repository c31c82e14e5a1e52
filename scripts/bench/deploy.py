"""Deploying over loopback: bytes of a redeploy, seconds of a rollback, twenty devices and one, cut cables.

    .venv/bin/python scripts/bench/deploy.py --bundle bundles/jetson-agx --output docs/bench/deploy

Writes deploy.json and deploy.md. The server is OpenSSH's own, run by the present user on a free port; each
device is a home folder of its own behind it. Redeploy and rollback run the real commands at both ends, this
environment standing for the device's. In the other rows the device's own work is a stand-in that sleeps:
twenty real devices bring twenty processors, and this machine has few.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from edgeglm.bundle.pack import write_bundle  # noqa: E402
from edgeglm.bundle.verify import open_bundle  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.deploy.fleet import FleetPlan, Summary, hosts_from_texts  # noqa: E402
from edgeglm.deploy.inventory import inventory_at  # noqa: E402
from edgeglm.deploy.options import DeployOptions  # noqa: E402
from edgeglm.deploy.remote import rolled_back  # noqa: E402
from edgeglm.deploy.session import deployed  # noqa: E402
from tests.deploy.loopback import Device, Server, add_device, sshd, stop, stub_python  # noqa: E402
from tests.deploy.proxy import cable  # noqa: E402
from tests.runtime.test_retrieval import colour_bundle  # noqa: E402

ROUNDS = 7
POINTS = 20
DEVICES = 20


class Bench:
    """One server, one sender, and the devices that were made."""

    def __init__(self, work: Path, server: Server, bundle: Path) -> None:
        self.work, self.server, self.bundle = work, server, bundle
        self.sender = work / "sender"
        (self.sender / ".ssh").mkdir(parents=True)
        os.environ["HOME"] = str(self.sender)
        os.environ.pop("SSH_AUTH_SOCK", None)
        self.store = Store(work / "store")
        self.devices: list[Device] = []
        (work / "stub").mkdir()
        self.stub = stub_python(work / "stub", ROOT, sys.executable)

    def device(self, name: str, *, port: int | None = None) -> Device:
        """Make a device."""
        home = self.work / "devices" / name
        self.devices.append(add_device(self.server, self.sender, home, port=port, PATH=os.environ["PATH"]))
        return self.devices[-1]

    def deploy(self, bundle: Path, *names: str, real: bool = False) -> Summary:
        """Deploy once, without a canary."""
        python = sys.executable if real else self.stub
        options = DeployOptions(service="process", python=python, port=0, rounds=7, ready_seconds=120)
        plan = FleetPlan(canary=0, retries=0, parallel=DEVICES)
        return deployed(bundle, hosts_from_texts(names), options, plan, self.store, lambda *_: None)

    def small(self, name: str, *, seconds: float = 0.0, payload: bytes = b"x") -> Path:
        """Make a small bundle whose finalize sleeps on the device."""
        parts: dict[str, Path | bytes] = {
            "recipe.toml": f"# {name} finalize takes {seconds} s\n".encode(),
            "costs/payload.bin": payload,
        }
        return colour_bundle(self.work / "small" / name, **parts)


def one_tower_changed(bundle: Path, out: Path) -> tuple[Path, int]:
    """Copy a bundle with the largest tower of its default variant altered a little; return its bytes too."""
    with open_bundle(bundle) as opened:
        files = opened.variant().files
        name = max(files.values(), key=lambda one: opened.manifest.files[one].size)
        data = bytearray(opened.file(name).read_bytes())
        # The lowest mantissa bit of weights in the middle of the file: another tower, the same answers.
        middle = len(data) // 2 // 4 * 4
        for place in range(middle, middle + 64, 4):
            data[place] ^= 1
        parts: dict[str, Path | bytes] = {one: opened.file(one) for one in opened.manifest.files}
        parts.pop("bom.cdx.json", None)
        parts[name] = bytes(data)
        return write_bundle(out, sources=parts, manifest=opened.manifest), len(data)


def redeploy(bench: Bench) -> dict[str, Any]:
    """Bytes on the wire, both ways and with SSH's own, of a redeploy with one tower changed."""
    with cable(bench.server.port) as way:
        bench.device("wire", port=way.port)
        check(bench.deploy(bench.bundle, "wire", real=True))
        first, way.carried = way.carried, 0
        changed, size = one_tower_changed(bench.bundle, bench.work / "changed")
        check(bench.deploy(changed, "wire", real=True))
        moved, way.carried = way.carried, 0
        check(bench.deploy(changed, "wire", real=True))
        again = way.carried
    return {
        "first_bytes": first,
        "tower_bytes": size,
        "moved_bytes": moved,
        "over": moved / size - 1,
        "nothing_changed_bytes": again,
    }


def rollback(bench: Bench) -> dict[str, Any]:
    """Wall seconds of a rollback of the real bundle, from the connection to the answer of the former one."""
    inventory = inventory_at(bench.store.root)
    (host,) = hosts_from_texts(["wire-2"])
    pear = bench.device("wire-2")
    check(bench.deploy(bench.bundle, "wire-2", real=True))
    changed, _ = one_tower_changed(bench.bundle, bench.work / "changed-2")
    check(bench.deploy(changed, "wire-2", real=True))
    walls, there, work = [], [], []
    for _ in range(ROUNDS):
        started, used = time.perf_counter(), time.process_time()
        answer = asyncio.run(rolled_back(host, inventory, root=None, ready_seconds=60, lock_seconds=5))
        walls.append(time.perf_counter() - started)
        there.append(answer["seconds"])
        state = json.loads((pear.root / "run/state.json").read_bytes())
        work.append(time.process_time() - used + sum(cpu_seconds(state[name]) for name in ("pid", "child")))
    return {
        "wall_seconds": walls,
        "switch_seconds": there,
        "cpu_seconds": work,
        "load_average": os.getloadavg()[0],
    }


def cpu_seconds(process: int) -> float:
    """Return what a process has had of a processor since it began."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def twenty(bench: Bench, seconds: float) -> dict[str, Any]:
    """Wall time of twenty devices over that of one, interleaved; finalize sleeps so long on each."""
    names = [f"tree-{number:02}" for number in range(DEVICES)]
    for name in names:
        if not (bench.work / "devices" / name).exists():
            bench.device(name)
    one, all_of_them = [], []
    for turn in range(ROUNDS + 1):
        for chosen, walls in ((names[:1], one), (names, all_of_them)):
            bundle = bench.small(f"turn-{turn}-{len(chosen)}-{seconds}", seconds=seconds)
            started = time.perf_counter()
            check(bench.deploy(bundle, *chosen))
            if turn:  # the first makes the folders
                walls.append(time.perf_counter() - started)
    ratios = [many / single for many, single in zip(all_of_them, one, strict=True)]
    return {"finalize_seconds": seconds, "one": one, "twenty": all_of_them, "ratios": ratios}


def cuts(bench: Bench, seed: int) -> dict[str, Any]:
    """Cut the cable at random points of the bytes of a deploy; count what serves and what is completed."""
    chance = random.Random(seed)
    served = completed = 0
    with cable(bench.server.port) as way:
        pear = bench.device("cut", port=way.port)
        check(bench.deploy(bench.small("good"), "cut"))
        before = way.carried
        serving = bench.small("whole", payload=os.urandom(400_000))
        check(bench.deploy(serving, "cut"))
        length = way.carried - before
        points = []
        while len(points) < POINTS:
            fresh = bench.small(f"cut-{len(points)}-{way.carried}", seconds=0.3, payload=os.urandom(400_000))
            point = chance.randrange(1, length)
            way.limit = way.carried + point
            summary = bench.deploy(fresh, "cut")
            way.limit = None
            if summary.exit_code == 0:  # this run was shorter than the one that was measured
                serving = fresh
                continue
            points.append(round(point / length, 3))
            served += pear.answers() in (digest_of(serving), digest_of(fresh))
            completed += bench.deploy(fresh, "cut").exit_code == 0 and pear.answers() == digest_of(fresh)
            serving = fresh
    return {"points": points, "served": served, "completed": completed, "seed": seed}


def digest_of(bundle: Path) -> str:
    """Return the content digest of a bundle folder."""
    return str(msgspec.json.decode((bundle / "manifest.json").read_bytes())["content_digest"])


def check(summary: Summary) -> None:
    """Stop the bench where a deploy failed."""
    if summary.exit_code:
        raise SystemExit("; ".join(one.reason for one in summary.devices if one.reason))


def page(found: dict[str, Any]) -> str:
    """Return the table as markdown."""
    wire, back, cut = found["redeploy"], found["rollback"], found["cuts"]
    median = statistics.median
    rows = []
    if wire:
        rows += [
            (
                "redeploy, one tower changed: bytes on the wire over the tower's",
                f"{wire['moved_bytes']:,} over {wire['tower_bytes']:,}: {wire['over']:+.2%}",
                "+1 %",
            ),
            (
                "redeploy, nothing changed: bytes on the wire",
                f"{wire['nothing_changed_bytes']:,} (first deploy {wire['first_bytes']:,})",
                "-",
            ),
        ]
    if back:
        rows.append(
            (
                f"rollback, median of {len(back['wall_seconds'])}, connection and real server included",
                f"{median(back['wall_seconds']):.2f} s at a load of {back['load_average']:.0f} on the cores, "
                f"{median(back['cpu_seconds']):.2f} s of CPU",
                "2 s",
            )
        )
    for row in found["twenty"] or ():
        rows.append(
            (
                f"twenty devices over one, finalize {row['finalize_seconds']:g} s, median of {ROUNDS}",
                f"{median(row['ratios']):.2f}x ({median(row['twenty']):.1f} s, {median(row['one']):.1f} s)",
                "3x",
            )
        )
    if cut:
        rows.append(
            (
                f"cut at {len(cut['points'])} random points: served after it, completed by the next run",
                f"{cut['served']} and {cut['completed']}",
                f"{POINTS} and {POINTS}",
            )
        )
    lines = [
        "# Deploying over loopback",
        "",
        f"Made by `{found['command']}`",
        f"at commit {found['commit']} on {found['machine']}, which other work shared.",
        "OpenSSH's server on loopback. Bytes are counted between client and server, both ways, SSH's own",
        "included. Redeploy and rollback run the real commands at both ends; in the other rows finalize and",
        "the server are stand-ins, since twenty boards would not share one processor.",
        "",
        "| what | measured | aim |",
        "| --- | ---: | ---: |",
        *(f"| {what} | {measured} | {aim} |" for what, measured, aim in rows),
        "",
        *found["notes"],
    ]
    return "\n".join([*lines, ""])


def measured(bench: Bench, only: str | None, former: dict[str, Any], seed: int) -> dict[str, Any]:
    """Run all parts, or one of them beside what a former run found."""
    parts: dict[str, Callable[[], Any]] = {
        "redeploy": lambda: redeploy(bench),
        "rollback": lambda: rollback(bench),
        "twenty": lambda: [twenty(bench, seconds) for seconds in (0.0, 5.0)],
        "cuts": lambda: cuts(bench, seed),
    }
    return {name: part() if only in (None, name) else former.get(name) for name, part in parts.items()}


def main() -> None:
    """Run everything and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="A real bundle folder.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--only", choices=["redeploy", "rollback", "twenty", "cuts"], help="One part; keep the others."
    )
    parser.add_argument("--seed", type=int, default=20)
    given = parser.parse_args()
    output = given.output.resolve()
    place = output.with_suffix(".json")
    former = json.loads(place.read_text()) if given.only and place.exists() else {}
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin"
    program = shutil.which("sshd")
    if program is None:
        raise SystemExit("there is no sshd here; install openssh-server")
    bundle = given.bundle.resolve()
    with tempfile.TemporaryDirectory(prefix="edgeglm-bench-") as work:
        (Path(work) / "sshd").mkdir()
        with sshd(program, Path(work) / "sshd") as server:
            bench = Bench(Path(work), server, bundle)
            try:
                found = measured(bench, given.only, former, given.seed)
            finally:
                for device in bench.devices:
                    stop(device)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    document = {
        "command": "python scripts/bench/deploy.py --bundle bundles/jetson-agx --output docs/bench/deploy",
        "commit": commit,
        "machine": f"{os.cpu_count()} shared {platform.machine()} CPU cores, no GPU",
        **found,
        "notes": former.get("notes", []),
    }
    place.write_text(json.dumps(document, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(document))


if __name__ == "__main__":
    main()
