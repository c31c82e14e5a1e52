"""A Python environment from wheels that came with the bundle: no network is asked for."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgeglm.deploy.device.layout import Layout, read_json, sync_all, write_json
from edgeglm.deploy.device.objects import linked, object_path, remove_tree
from edgeglm.deploy.device.wire import Refused

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]


def is_complete(layout: Layout, name: str) -> bool:
    """Say whether an environment was finished."""
    return bool(read_json(layout.environments / name / "complete.json"))


def made(layout: Layout, name: str, wheels: Mapping[str, str], say: Say) -> str:
    """Make the environment ``name`` from ``{file name: sha256}`` and return its interpreter.

    The wheel of pip itself is one of them and does the work, so that a device needs neither pip nor
    ensurepip. Raises Refused with pip's words.
    """
    folder = layout.environments / name
    python = folder / "bin" / "python"
    if is_complete(layout, name):
        return str(python)
    import tempfile

    remove_tree(folder)
    say("making a Python environment")
    # A Jetson's tensorrt is a system package: the environment must see it.
    _run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(folder)])
    with tempfile.TemporaryDirectory(dir=layout.root, prefix=".wheels-") as place:
        paths = []
        for file, digest in wheels.items():
            path = Path(place) / Path(file).name
            linked(object_path(layout, digest), path)
            paths.append(str(path))
        pip = next(path for path in paths if Path(path).name.startswith("pip-"))
        say(f"installing {len(paths)} wheels")
        # pip compiles what it installs: the server may write nothing there, and would compile at each start.
        options = ["--no-index", "--no-deps", "--disable-pip-version-check", "-q"]
        _run([str(python), f"{pip}/pip", "install", *options, "--ignore-installed", *paths])
    sync_all(folder)  # or a power cut leaves what is said to be complete, with empty files
    write_json(folder / "complete.json", {"objects": sorted(wheels.values()), "wheels": sorted(wheels)})
    return str(python)


def borrowed(slot: Path, python: str) -> None:
    """Let a slot use an environment that is there already. Raises Refused where there is none.

    Whether edgeglm is in it is for finalize to find out: asking first is one more start of an interpreter.
    """
    # The name must stay as it was given: a venv finds its packages by the path it was called with.
    if not os.access(python, os.X_OK):
        raise Refused(f"there is no Python at {python} on the device; leave --python out to bring one along")
    folder = slot / "environment" / "bin"
    folder.mkdir(parents=True)
    launcher = folder / "python"
    launcher.write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
    launcher.chmod(0o755)


def ends_with_us() -> None:
    """Have the kernel kill a child as soon as this process ends, however that ends (prctl(2)).

    The lock ends then, too: who takes it next writes into the slot that the child still writes into.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(command: Sequence[str]) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, preexec_fn=ends_with_us, check=False
    )
    if done.returncode:
        words = "; ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise Refused(f"cannot make a Python environment ({words}); mend that, or pass --python")
