"""Fuzz every decoder of what callers send, one after the other, and keep a receipt.

    .venv/bin/python scripts/bench/fuzz.py --seconds 180 --output docs/bench/fuzz

Needs atheris (the extra ``dev``). The targets are those of tests/serve/fuzz_decoders.py; inputs are steered
towards new code of edgeglm and Pillow. Writes fuzz.json and fuzz.md, and stops with 1 if a target was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("image", "text", "body", "compressed", "message", "request")


def fuzzed(target: str, seconds: int, seed: int) -> dict[str, Any]:
    """Run one target; return what libFuzzer says of it."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-artifact_prefix={folder}/",
            "-print_final_stats=1",
        ]
        command = [sys.executable, "-m", "tests.serve.fuzz_decoders", target, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds * 3 + 300)
        broken = [path.name for path in Path(folder).iterdir()]
    said = done.stderr
    inputs, took = re.findall(r"Done (\d+) runs in (\d+) second", said)[-1] if "Done " in said else ("0", "0")
    covered = re.findall(r"cov: (\d+)", said)
    memory = re.findall(r"peak_rss_mb:\s+(\d+)", said)
    return {
        "target": target,
        "inputs": int(inputs),
        "seconds": int(took),
        "edges": [int(covered[0]), int(covered[-1])] if covered else [0, 0],
        "memory_mb": int(memory[-1]) if memory else 0,
        "broken": broken or ([] if done.returncode == 0 else [said[-500:]]),
    }


def markdown(found: dict[str, Any]) -> str:
    """Write the page."""
    lines = [
        "# Fuzzing what callers send",
        "",
        "Coverage-guided inputs for every decoder that a caller reaches before an engine runs: images,",
        "texts, inference requests in JSON and binary, compressed bodies, messages of gRPC, and HTTP on",
        "the short way. An input breaks a target if it raises anything but an error with a remedy, or takes",
        "20 s or 4 GB. Inputs are steered by the Python code of edgeglm and Pillow alone: the tokenizer in",
        "Rust and the codecs in C are not instrumented, so their edges are not counted, though a crash",
        "would be.",
        "",
        "| target | inputs | seconds | covered edges: first to last | peak memory | broken |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["targets"]:
        first, last = row["edges"]
        lines.append(
            f"| {row['target']} | {row['inputs']:,} | {row['seconds']} | {first} to {last} "
            f"| {row['memory_mb']} MB | {len(row['broken'])} |"
        )
    lines += [
        "",
        f"Machine: {found['machine']}. Made by `{found['command']}` at commit {found['commit']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Fuzz and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    found: dict[str, Any] = {
        "machine": f"{os.cpu_count()} shared {platform.machine()} CPU cores, "
        f"Python {platform.python_version()}",
        "command": f".venv/bin/python scripts/bench/fuzz.py --seconds {given.seconds} --seed {given.seed} "
        "--output docs/bench/fuzz",
        "commit": commit,
        "targets": [fuzzed(target, given.seconds, given.seed) for target in TARGETS],
    }
    given.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(markdown(found))
    sys.exit(1 if any(row["broken"] for row in found["targets"]) else 0)


if __name__ == "__main__":
    main()
