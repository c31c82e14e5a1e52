"""How fast a bundle is verified, in what memory, and how soon one is judged for all targets.

    .venv/bin/python scripts/bench/verify.py [GIGABYTES] [BUNDLE]

Writes a signed bundle of random bytes into a temporary folder, verifies it in a process of its own
(best and median of seven, files warm in the page cache) and takes that process's peak memory, against
the same for a bundle of a tenth of the size; the smaller one also as an archive, which is unpacked while it
is verified. Then runs `edgeglm plan` on BUNDLE where one is given. Writes docs/bench/verify.json and .md.
What becomes of altered bundles is in mutations.py.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.bundle.archive import ArchiveKind, archive_from_folder
from edgeglm.bundle.manifest import Manifest, TargetRecord, TowerRecord, VariantRecord
from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.sign import sign_bundle
from edgeglm.bundle.signing import make_key
from edgeglm.bundle.trust import Trust
from edgeglm.bundle.verify import open_bundle

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "docs" / "bench"
ROUNDS, FILES = 7, 16
_ARCHIVES: tuple[ArchiveKind, ...] = ("zip", "tar.zst")
REACH_GB_S, REACH_PLAN_S = 1.0, 2.0

_CHILD = """
import json, resource, sys
from pathlib import Path
from edgeglm.bundle.signing import public_key_from_file
from edgeglm.bundle.trust import Trust
from edgeglm.bundle.verify import verify_report
trust = Trust(keys=(public_key_from_file(Path(sys.argv[2])),))
before = resource.getrusage(resource.RUSAGE_SELF)
report = verify_report(Path(sys.argv[1]), trust=trust)
after = resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
# Not ru_maxrss: the kernel lets a child inherit the parent's from before its exec.
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
answer = {"seconds": report.seconds, "bytes": report.size, "peak_kb": peak, "cpu_seconds": cpu}
print(json.dumps(answer))
"""


def random_bundle(folder: Path, size: int, key: Path) -> Path:
    """Write a signed bundle of ``size`` random bytes in ``FILES`` files."""
    sources: dict[str, Path | bytes] = {}
    for number in range(FILES):
        source = folder / f"source-{number}"
        with source.open("wb") as out:
            for _ in range(0, size // FILES, 1 << 24):
                out.write(os.urandom(min(1 << 24, size // FILES)))
        sources[f"models/fp32/part{number}.onnx"] = source
    tower = TowerRecord(inputs=(), outputs=(), embedding_dim=1, parameters=0)
    manifest = Manifest(
        name="bench",
        created="2026-01-01",
        edgeglm="0",
        target=TargetRecord(name="cpu"),
        default_variant="fp32",
        variants=(VariantRecord(name="fp32", files={"image": "models/fp32/part0.onnx"}, gate="reference"),),
        towers={"image": tower},
    )
    bundle = write_bundle(folder / "bundle", sources=sources, manifest=manifest)
    sign_bundle(bundle, [key])
    return bundle


def as_archive(bundle: Path, kind: ArchiveKind, key: Path) -> Path:
    """Write a bundle again as one signed file."""
    path = bundle.with_name(f"bundle.{kind}")
    with open_bundle(bundle, trust=Trust(), verify=False) as opened:
        archive_from_folder(bundle, opened.manifest.files, path, kind)
    sign_bundle(path, [key])
    return path


def measured(bundle: Path, key: Path, form: str = "folder") -> dict[str, Any]:
    """Verify several times, each in a new process."""
    command = [sys.executable, "-c", _CHILD, str(bundle), str(key.with_suffix(".pub"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answers = [
        json.loads(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
        for _ in range(ROUNDS)
    ]
    size = answers[0]["bytes"]
    return {
        "form": form,
        "gigabytes": round(size / 1e9, 3),
        "best_gb_s": round(size / 1e9 / min(a["seconds"] for a in answers), 2),
        "median_gb_s": round(size / 1e9 / statistics.median(a["seconds"] for a in answers), 2),
        "cpu_seconds": round(statistics.median(a["cpu_seconds"] for a in answers), 3),
        "gb_per_cpu_second": round(size / 1e9 / min(a["cpu_seconds"] for a in answers), 2),
        "peak_mb": round(max(a["peak_kb"] for a in answers) / 1024, 1),
    }


def planned(bundle: Path) -> dict[str, Any]:
    """Time the whole command that judges every graph of a bundle for all targets."""
    command = [sys.executable, "-m", "edgeglm.cli.main", "plan", str(bundle), "--json", "--allow-unsigned"]
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    judged = json.loads(done.stdout)["preflight"]
    return {
        "targets": len({one["target"] for one in judged}),
        "graphs": len({one["subject"] for one in judged}),
        "median_s": round(statistics.median(seconds), 2),
        "worst_s": round(max(seconds), 2),
        "reach_s": REACH_PLAN_S,
    }


def main(arguments: list[str]) -> int:
    """Measure and write; exit with 1 when the figure to reach is not."""
    gigabytes = float(arguments[0]) if arguments else 1.0
    load = round(os.getloadavg()[0], 1)
    rows, archives = [], []
    for size in (gigabytes / 10, gigabytes):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            key, _ = make_key(folder, "bench")
            bundle = random_bundle(folder, int(size * 1e9), key)
            rows.append(measured(bundle, key))
            if size < gigabytes:
                archives = [measured(as_archive(bundle, kind, key), key, kind) for kind in _ARCHIVES]
    plan = planned(Path(arguments[1])) if len(arguments) > 1 else None
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    result = {
        "command": f"scripts/bench/verify.py {gigabytes:g}{' BUNDLE' if plan else ''}",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "machine": f"{found[1].strip() if found else platform.machine()}, {os.cpu_count()} cores",
        "load": load,
        "nice": os.nice(0),
        "reach_gb_s": REACH_GB_S,
        "rows": [*rows, *archives],
        "plan": plan,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "verify.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    lines = [
        "# Verifying a bundle",
        "",
        f"`{result['command']}` at commit {result['commit']}, {result['machine']}, two threads, load "
        f"{result['load']} when it began, priority {result['nice']}. Signature, names, sizes and sha256 of "
        f"every file; to reach: {REACH_GB_S:g} GB/s in constant memory.",
        "",
        "| form | GB | best GB/s | median GB/s | GB a CPU second | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['form']} | {row['gigabytes']} | {row['best_gb_s']} | {row['median_gb_s']} "
            f"| {row['gb_per_cpu_second']} | {row['peak_mb']} |"
            for row in (*rows, *archives)
        ),
        "",
        "Peak memory is that of the process (VmHWM), imports and the code of its libraries included. An "
        "archive is decompressed and written out in the same pass, on one thread; its rate is not the one to "
        "reach.",
        "",
    ]
    if plan:
        lines += [
            f"`edgeglm plan BUNDLE`, from the start of Python to its end: {plan['graphs']} graphs judged "
            f"for {plan['targets']} targets in {plan['median_s']} s (median of {ROUNDS}, "
            f"worst {plan['worst_s']} s); to reach: {REACH_PLAN_S:g} s.",
            "",
        ]
    (OUT / "verify.md").write_text("\n".join(lines))
    sys.stdout.write("\n".join(lines))
    reached = rows[-1]["best_gb_s"] >= REACH_GB_S
    return 0 if reached and (plan is None or plan["worst_s"] <= REACH_PLAN_S) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
