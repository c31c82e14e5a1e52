"""What becomes of ten thousand altered bundles and manifests.

    .venv/bin/python scripts/bench/mutations.py

Runs tests/bundle/test_fuzz.py, whole: what crashes, writes outside its folder or passes as the maker's fails
there. Writes docs/bench/mutations.json and .md.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "docs" / "bench"
REACH = 10_000


def main() -> int:
    """Run the tests and write; exit with 1 when one fails or too few were tried."""
    from tests.bundle.test_fuzz import ARCHIVES, FORGERIES, MANIFESTS

    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", "tests/bundle/test_fuzz.py"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    tried = {"altered manifests": MANIFESTS, "altered archives": ARCHIVES, "forgeries": FORGERIES}
    passed = done.returncode == 0
    result = {
        "command": "scripts/bench/mutations.py",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "machine": f"{found[1].strip() if found else platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(seconds, 1),
        "tried": tried,
        "reach": REACH,
        "passed": passed,
        "said": done.stdout.strip().splitlines()[-1],
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "mutations.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    lines = [
        "# Altered and forged bundles",
        "",
        f"`{result['command']}` at commit {result['commit']}, {result['machine']}, other work running: "
        f'`pytest -m slow tests/bundle/test_fuzz.py` said "{result["said"]}" after {result["seconds"]} s.',
        "",
        "| what | tried | crashed | wrote outside its folder | passed as the maker's |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {count:,} | " + ("0 | 0 | 0 |" if passed else "see the test | | |")
            for name, count in tried.items()
        ),
        f"| **all** (to reach: {REACH:,}) | {sum(tried.values()):,} | | | |",
        "",
        "Drawn from a whole, signed bundle with fixed seeds. Manifests: places of the JSON changed in type, "
        "name or number, and bytes flipped, cut, dropped, repeated or inserted. Archives, zip and tar.zst: "
        "the same bytes. Forgeries: archives whose manifest fits their content, with hostile names "
        "(absolute, upwards, doubled, changed in case, of links) and the signature of another bundle or "
        "none. A forgery counts as accepted if it passes where the maker's key is asked for; refused ones "
        "leave nothing on the disk.",
        "",
    ]
    (OUT / "mutations.md").write_text("\n".join(lines))
    sys.stdout.write("\n".join(lines))
    return 0 if passed and sum(tried.values()) >= REACH else 1


if __name__ == "__main__":
    sys.exit(main())
