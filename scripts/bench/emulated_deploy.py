"""A deploy to an emulated aarch64 device over SSH: wheels, finalize, server, rollback, in that architecture.

    .venv/bin/python scripts/bench/emulated_deploy.py --device FOLDER

FOLDER is what scripts/emulated-device made, or where it is made now. The steps are those of
tests/deploy/test_emulated_aarch64.py; what they found is put into docs/bench/emulated-device.json and .md, as
"deploy", beside what finalize found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent.parent
PLACE = ROOT / "docs/bench/emulated-device"
HEADING = "## Deployed to, over SSH"
TEST = "tests/deploy/test_emulated_aarch64.py"


def found_by_test(device: Path) -> dict[str, Any]:
    """Run the steps and return what they found, with the whole time in seconds."""
    subprocess.run(
        [ROOT / "scripts/emulated-device", device, "edgeglm", "--help"], check=True, stdout=sys.stderr
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", TEST, "-m", "slow", "-q"]
        command = [*pytest, f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the family with properties
        environment = {**os.environ, "EDGEGLM_EMULATED_DEVICE": str(device)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
        case = next(ElementTree.parse(report).iter("testcase"))
    said = [one.get("value") for one in case.iter("property") if one.get("name") == "found"]
    if not said:
        raise SystemExit("the steps were skipped; run this as root on an x86-64 Debian")
    return {"total_seconds": round(float(case.get("time", 0)), 1), **json.loads(said[0] or "{}")}


def section(found: dict[str, Any]) -> str:
    """Return what was found as markdown."""
    first, second = found["seconds"]
    rows = [(name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])]
    made = f"at commit {found['commit']}, {found['date']}, {found['machine_kind']}"
    chosen, library = ", ".join(found["chosen"]), " ".join(found["library"])
    lines = [
        HEADING,
        "",
        f"`{found['command']}` {made}.",
        "OpenSSH's server, in a namespace of its own, and the shell that it starts are the host's, x86-64;",
        "the Python behind them and all it runs are aarch64.",
        f"Wheels sent and installed, two bundles finalized and served one after the other ({chosen};",
        f"{library}), then `edgeglm rollback` to the first ({found['rollback_seconds']} s there): "
        f"{found['total_seconds']:.0f} s in all.",
        "Times under an emulator say nothing of a board; they are here to be compared with each other.",
        "",
        "| step | first, s | second, s |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {'-' if a is None else a} | {'-' if b is None else b} |" for name, a, b in rows),
        f"| bytes sent | {found['sent_bytes'][0]:,} | {found['sent_bytes'][1]:,} |",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run it and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=Path, required=True)
    given = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    found = {
        "command": "python scripts/bench/emulated_deploy.py --device FOLDER",
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine_kind": f"{os.cpu_count()} x86-64 CPU cores that other work shared",
        **found_by_test(given.device.resolve()),
    }
    document = json.loads(PLACE.with_suffix(".json").read_text())
    PLACE.with_suffix(".json").write_text(json.dumps({**document, "deploy": found}, indent=1) + "\n")
    page = PLACE.with_suffix(".md").read_text()
    PLACE.with_suffix(".md").write_text(page.partition(HEADING)[0] + section(found))


if __name__ == "__main__":
    main()
