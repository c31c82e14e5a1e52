"""Deploying over loopback: a redeploy's bytes, a rollback's seconds, twenty devices and one, cuts, secrets.

    .venv/bin/python scripts/bench/deploy.py --bundle bundles/jetson-agx --output docs/bench/deploy

Writes deploy.json and deploy.md. The server is OpenSSH's own, run by the present user on a free port; each
device is a home folder of its own behind it. Redeploy, rollback, secrets and one row of twenty run the real
commands at both ends, this environment standing for the device's. In the other rows the device's own work is
a stand-in that sleeps: twenty real devices bring twenty processors, and this machine has few. ``--only``
makes one part anew and keeps the others, each with the commit, the day and the load that it was made at.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import secrets
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
from deploy_counters import busy_seconds, children_seconds, cpu_seconds  # noqa: E402
from deploy_page import page  # noqa: E402

from edgeglm.bundle.pack import write_bundle  # noqa: E402
from edgeglm.bundle.verify import open_bundle  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.deploy.agent_source import agent_command, agent_source  # noqa: E402
from edgeglm.deploy.hosts import hosts_from_texts  # noqa: E402
from edgeglm.deploy.options import DeployOptions  # noqa: E402
from edgeglm.deploy.session import deployed  # noqa: E402
from edgeglm.deploy.summary import FleetPlan, Summary  # noqa: E402
from scripts.fixtures.colours import colour_bundle  # noqa: E402
from scripts.fixtures.loopback import Device, Server, add_device, sshd, stop, stub_python  # noqa: E402
from scripts.fixtures.proxy import cable  # noqa: E402
from scripts.fixtures.watcher import files_with, watcher  # noqa: E402

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

    def device(self, name: str, *, port: int | None = None, **environment: str) -> Device:
        """Make a device."""
        home = self.work / "devices" / name
        # No board has a version manager, whose shims take longer to start a Python than that takes.
        path = [one for one in os.environ["PATH"].split(os.pathsep) if not one.endswith("shims")]
        environment = {"PATH": os.pathsep.join(path), **environment}
        self.devices.append(add_device(self.server, self.sender, home, port=port, **environment))
        return self.devices[-1]

    def deploy(
        self, bundle: Path, *names: str, real: bool = False, flags: tuple[str, ...] = (), **more: Any
    ) -> Summary:
        """Deploy once, without a canary, to boards that are none of the bundle's target."""
        options = DeployOptions(
            service="process",
            python=sys.executable if real else self.stub,
            port=0,
            rounds=7,
            ready_seconds=400,
            serve_flags=flags,
            any_board=True,
        )
        plan = FleetPlan(canary=0, retries=0, parallel=DEVICES)
        more = {"on_change": lambda *_: None, **more}
        return deployed(bundle, hosts_from_texts(names), options, plan, self.store, **more)

    def small(self, name: str, *, seconds: float = 0.0, payload: bytes = b"x") -> Path:
        """Make a small bundle whose finalize sleeps on the device."""
        parts: dict[str, Path | bytes] = {
            "recipe.toml": f"# {name} finalize takes {seconds} s\n".encode(),
            "costs/payload.bin": payload,
        }
        return colour_bundle(self.work / "small" / name, **parts)


def towers_of(bundle: Path) -> dict[str, str]:
    """Return ``{tower: file}`` of the FP32 variant, or of the default one where there is none."""
    with open_bundle(bundle) as opened:
        names = [variant.name for variant in opened.manifest.variants]
        return dict(opened.variant("fp32" if "fp32" in names else None).files)


def one_tower_changed(bundle: Path, name: str, out: Path) -> tuple[Path, int]:
    """Copy a bundle with one tower's file altered a little; return that file's bytes too."""
    with open_bundle(bundle) as opened:
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
    """Bytes on the wire, both ways and with SSH's own, of a redeploy with one tower changed, for each."""
    towers = {}
    with cable(bench.server.port) as way:
        bench.device("wire", port=way.port)
        check(bench.deploy(bench.bundle, "wire", real=True))
        first = way.carried
        for tower, name in towers_of(bench.bundle).items():
            check(
                bench.deploy(bench.bundle, "wire", real=True)
            )  # the next differs from it by one tower alone
            changed, size = one_tower_changed(bench.bundle, name, bench.work / f"changed-{tower}")
            way.carried = 0
            check(bench.deploy(changed, "wire", real=True))
            moved = way.carried
            towers[tower] = {"tower_bytes": size, "moved_bytes": moved, "over": moved / size - 1}
        way.carried = 0
        check(bench.deploy(changed, "wire", real=True))
        again = way.carried
    source = len(agent_source()) + len(agent_command())
    return {
        "first_bytes": first, "towers": towers, "nothing_changed_bytes": again, "device_side_bytes": source
    }  # fmt: skip


def rollback(bench: Bench) -> dict[str, Any]:
    """Seconds of `edgeglm rollback` of the real bundle: the whole command, from its start to its end."""
    device = bench.device("wire-2")
    check(bench.deploy(bench.bundle, "wire-2", real=True))
    name = next(iter(towers_of(bench.bundle).values()))
    changed, _ = one_tower_changed(bench.bundle, name, bench.work / "changed-2")
    check(bench.deploy(changed, "wire-2", real=True))
    command = [sys.executable, "-m", "edgeglm.cli.main", "rollback", "wire-2", "--json"]
    environment = {**os.environ, "EDGEGLM_STORE": str(bench.store.root), "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    walls, there, work = [], [], []
    for _ in range(2):  # one to each slot: what pip compiles when it installs is compiled then, at both ends
        subprocess.run(command, env=environment, capture_output=True, check=True)
    for _ in range(ROUNDS):
        started, used = time.perf_counter(), children_seconds()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        walls.append(time.perf_counter() - started)
        there.append(json.loads(done.stdout)[0]["answer"]["seconds"])
        state = json.loads((device.root / "run/state.json").read_bytes())
        served = sum(cpu_seconds(state[name]) for name in ("pid", "child"))
        work.append(children_seconds() - used + served)
    return {"wall_seconds": walls, "switch_seconds": there, "cpu_seconds": work, "whole_command": True}


def twenty(bench: Bench, seconds: float) -> dict[str, Any]:
    """Wall time of twenty devices over that of one, interleaved; finalize sleeps so long on each.

    What the machine worked is split into this process, which is the sender, and all others, which are the
    devices: true as far as nothing else runs.
    """
    names = [f"tree-{number:02}" for number in range(DEVICES)]
    for name in names:
        if not (bench.work / "devices" / name).exists():
            bench.device(name)
    one, all_of_them = list[float](), list[float]()
    sender, others = list[float](), list[float]()
    for turn in range(ROUNDS + 1):
        for chosen, walls in ((names[:1], one), (names, all_of_them)):
            bundle = bench.small(f"turn-{turn}-{len(chosen)}-{seconds}", seconds=seconds)
            started, mine, whole = time.perf_counter(), time.process_time(), busy_seconds()
            check(bench.deploy(bundle, *chosen))
            if not turn:  # the first makes the folders
                continue
            walls.append(time.perf_counter() - started)
            if len(chosen) > 1:
                sender.append(time.process_time() - mine)
                others.append(busy_seconds() - whole - sender[-1])
    ratios = [many / single for many, single in zip(all_of_them, one, strict=True)]
    return {
        "finalize_seconds": seconds,
        "one": one,
        "twenty": all_of_them,
        "ratios": ratios,
        "sender_cpu_seconds": sender,
        "devices_cpu_seconds": others,
    }


def twenty_real(bench: Bench) -> dict[str, Any]:
    """Wall time of a first deploy of the real bundle, real commands at both ends, to one and to twenty."""
    names = [f"real-{number:02}" for number in range(DEVICES + 1)]
    for name in names:
        bench.device(name)
    walls, finalize = [], []
    for chosen in (names[:1], names[1:]):
        started = time.perf_counter()
        summary = bench.deploy(bench.bundle, *chosen, real=True)
        walls.append(time.perf_counter() - started)
        check(summary)
        delivered = [found.delivered for found in summary.devices]
        finalize.append(statistics.median(one.seconds["finalize"] for one in delivered if one))
    for device in bench.devices:
        if device.name in names:
            stop(device)
    one, many = walls
    return {"one": one, "twenty": many, "ratio": many / one, "finalize_seconds": finalize}


def nothing_secret(bench: Bench) -> dict[str, Any]:
    """Look for secrets on every command line during a real deploy, and in all that it leaves."""
    words = [secrets.token_hex(16).encode() for _ in range(2)]
    device = bench.device("secret", EDGEGLM_SECRET=words[0].decode())
    token = bench.work / "token"
    token.write_bytes(words[1])
    words.append((bench.sender / ".ssh/secret").read_bytes().splitlines()[-3])
    said: list[str] = []
    summary_path = bench.work / "summary.json"
    with watcher() as seen:
        summary = bench.deploy(
            bench.bundle,
            "secret",
            real=True,
            flags=(f"--token-file={token}",),
            summary_path=summary_path,
            on_change=lambda *change: said.append(" ".join(change)),
        )
    check(summary)
    keys = bench.server.folder / "authorized_keys"
    places = [device.root, bench.store.root, bench.server.folder, summary_path]
    return {
        "secrets": "a variable of the session, a token file of the server, the private key",
        "samples": seen.samples,
        "command_lines": len(seen.seen),
        "on_command_lines": len(seen.hits(words)),
        "in_output": sum(word.decode() in "\n".join(said) for word in words),
        "in_files": len([path for path in files_with(words, *places) if path != keys]),
    }


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
        points = list[float]()
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


def parts_of(bench: Bench, seed: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what can be measured, by name."""
    return {
        "redeploy": lambda: redeploy(bench),
        "rollback": lambda: rollback(bench),
        "twenty": lambda: {"rows": [twenty(bench, seconds) for seconds in (0.0, 5.0)]},
        "real": lambda: twenty_real(bench),
        "cuts": lambda: cuts(bench, seed),
        "secrets": lambda: nothing_secret(bench),
    }


def stamped(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure one part and say at which commit, when and beside how much other work."""
    load = os.getloadavg()[0]
    found = part()
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"commit": f"{commit}{'+' if changed else ''}", "date": day, "load_average": load, **found}


PARTS = ("redeploy", "rollback", "twenty", "real", "cuts", "secrets")


def main() -> None:
    """Run everything and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="A real bundle folder.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=PARTS, action="append", help="One part; keep the others.")
    parser.add_argument("--seed", type=int, default=20)
    given = parser.parse_args()
    output = given.output.resolve()
    place = output.with_suffix(".json")
    former = json.loads(place.read_text()) if place.exists() else {}
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
                parts = parts_of(bench, given.seed)
                found = {name: stamped(parts[name]) for name in given.only or PARTS}
            finally:
                for device in bench.devices:
                    stop(device)
    kept = {
        name: former[name] for name in PARTS if isinstance(former.get(name), dict) and "date" in former[name]
    }
    document = {
        "command": "python scripts/bench/deploy.py --bundle bundles/jetson-agx --output docs/bench/deploy",
        "machine": f"{os.cpu_count()} {platform.machine()} CPU cores, no GPU",
        **kept,
        **found,
    }
    place.write_text(json.dumps(document, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(document))


if __name__ == "__main__":
    main()
