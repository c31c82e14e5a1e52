"""What the receipt of the whole build measures: memory of all processes, not of the largest alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

# A process with a child, each of which holds 80 MB until it is told to end.
HOLDING = """
import subprocess, sys
held = bytearray(80_000_000)
held[::4096] = b"x" * len(held[::4096])
child = None
if len(sys.argv) > 2:
    command = [sys.executable, "-c", sys.argv[1], sys.argv[1]]
    child = subprocess.Popen(command, stdin=0, stdout=subprocess.PIPE)
    child.stdout.readline()
print("ready", flush=True)
sys.stdin.read()
"""


def _bench(repository: Path, name: str) -> ModuleType:
    """Load a script that imports its neighbours."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", repository / f"scripts/bench/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "scripts/bench"))
        spec.loader.exec_module(module)
    return module


def test_the_peak_is_of_a_process_and_its_children_together(repository: Path):
    memory = _bench(repository, "memory_of_all")
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this kernel tells no PSS")
    command = [sys.executable, "-c", HOLDING, HOLDING, "parent"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with memory.PeakOfAll(process.pid) as sampled:
            pass
        assert len(memory.children(process.pid)) == 2
        assert 160e6 < sampled.peak_bytes < 400e6
        assert 80e6 < memory.pss_bytes(process.pid) < sampled.peak_bytes - 80e6
        process.communicate()
    assert memory.pss_bytes(process.pid) == 0, "it is gone"


def test_a_kernel_that_does_not_tell_gives_no_row(repository: Path):
    build = _bench(repository, "build")
    assert build.all_processes(build.Run(1.0, 2.8, 0.0, "")) == []
    (row,) = build.all_processes(build.Run(1.0, 2.8, 3.14, ""))
    assert (row["what"], row["measured"]) == ("peak memory, all processes (PSS, every 0.5 s)", "3.1 GB")
