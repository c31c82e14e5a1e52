"""What a device must hold for the runner alone: megabytes on disk and, idle, in memory.

    .venv/bin/python scripts/bench/device_install.py

For each Python with a device lock and an interpreter here: a fresh environment from the lock, without
compiled bytecode, and a runner that serves a bundle of two tiny towers and waits. Writes
docs/bench/device_install.json and device_install.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from runner_report import commit_of  # noqa: E402

from scripts.fixtures.colours import colour_bundle, colour_tower  # noqa: E402

DISK_MB, RSS_MB = 260, 200
_IDLE = """
import asyncio, os, sys
from pathlib import Path
from edgeglm.runtime.runner import Runner

async def main():
    async with Runner(Path(sys.argv[1])) as runner:
        await runner.embed_text("red")
        await asyncio.sleep(0.5)
        print(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

asyncio.run(main())
"""


def measured(version: str, lock: Path, folder: Path, bundle: Path) -> dict[str, Any] | None:
    """Install one lock and run the runner in it; None where there is no such interpreter."""
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode:
        return None
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    home = folder / version
    subprocess.run([found, "-m", "venv", "--without-pip", home], check=True, env=environment)
    packages = next(home.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "-qq"]
    install += ["--no-compile", "--no-deps", "--require-hashes", "-r", str(lock)]
    subprocess.run(install, check=True, env=environment)
    sizes = {
        part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        for part in packages.iterdir()
        if part.is_dir()
    }
    shutil.copytree(
        ROOT / "edgeglm", packages / "edgeglm", ignore=shutil.ignore_patterns("__pycache__"), symlinks=False
    )
    disk = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file())
    run: list[str | Path] = [home / "bin" / "python", "-B", "-c", _IDLE, bundle]
    rss = int(subprocess.run(run, check=True, capture_output=True, text=True, env=environment).stdout)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:4]
    return {
        "python": version,
        "disk_mb": round(disk / 1e6, 1),
        "rss_idle_mb": round(rss / 1e6, 1),
        "largest_mb": {name: round(size / 1e6, 1) for name, size in largest},
    }


def markdown(report: dict[str, Any]) -> str:
    """Write the report as a page."""
    lines = [
        "# What a device holds for the runner alone",
        "",
        f"Machine: {report['machine']}; commit {report['commit']}; `{report['command']}`.",
        "",
        "| Python | on disk, MB | reach | idle in memory, MB | reach | result | largest parts, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        good = row["disk_mb"] <= DISK_MB and row["rss_idle_mb"] <= RSS_MB
        parts = ", ".join(f"{name} {size:g}" for name, size in row["largest_mb"].items())
        lines.append(
            f"| {row['python']} | {row['disk_mb']:g} | <= {DISK_MB} | {row['rss_idle_mb']:g} | <= {RSS_MB} "
            f"| {'reached' if good else 'falls short'} | {parts} |"
        )
    lines += [
        "",
        "x86-64 wheels, no bytecode. Idle: one text was embedded, then half a second.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure every Python, and write both files."""
    parser = argparse.ArgumentParser(description="Size of the runner's install.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "bench" / "device_install")
    arguments = parser.parse_args()
    towers = {
        f"models/{variant}/{kind}.onnx": colour_tower(kind)
        for variant in ("fp32", "int8")
        for kind in ("image", "text")
    }
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = colour_bundle(folder / "colours", **towers)
        for lock in sorted((ROOT / "scripts" / "locks").glob(f"device-*-{platform.machine()}.txt")):
            digits = lock.name.split("-")[1].removeprefix("py")
            row = measured(f"{digits[0]}.{digits[1:]}", lock, folder, bundle)
            rows += [row] if row is not None else []
    commit = commit_of(ROOT)
    report = {
        "command": ".venv/bin/python scripts/bench/device_install.py",
        "commit": commit,
        "machine": f"{os.cpu_count()} shared {platform.machine().replace('_', '-')} CPU cores",
        "rows": rows,
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(report))
    sys.stdout.write(markdown(report))


if __name__ == "__main__":
    main()
