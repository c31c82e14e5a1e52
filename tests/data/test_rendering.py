"""If this fails, processes of a build that was killed stay on the machine until it starts anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("resvg_py", reason="the host half is not installed")

SCRIPT = """
import multiprocessing, os, signal
from edgeglm.core.progress import QuietProgress
from edgeglm.data.rendering import rendered
if __name__ == "__main__":
    icons = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M1 1h5v5z"/></svg>'] * 2000
    pixels = rendered(icons, 48, threads=2, progress=QuietProgress())
    next(pixels)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="whether a process lives is read from /proc")
def test_what_renders_ends_with_the_build_that_started_it_also_by_a_kill(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    children = [int(pid) for pid in done.stdout.split()]
    assert children
    limit = time.monotonic() + 30
    try:
        while any(map(lives, children)) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not any(map(lives, children))
    finally:
        for child in filter(lives, children):
            os.kill(child, signal.SIGKILL)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
