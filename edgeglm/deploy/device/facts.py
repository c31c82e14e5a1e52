"""What a device is, read from its files; the sender makes a board of it before anything is installed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# What edgeglm.engines.board reads. A test device brings its own under $EDGEGLM_DEVICE_FILES.
BOARD_FILES = (
    "proc/device-tree/compatible",
    "proc/device-tree/model",
    "etc/nv_tegra_release",
    "etc/nvpmodel.conf",
    "var/lib/nvpmodel/status",
    "proc/meminfo",
    "sys/fs/cgroup/memory.max",
    "sys/fs/cgroup/memory.current",
)
SHORTENED_FILES = ("var/lib/dpkg/status", "proc/cpuinfo")
FILES_VARIABLE = "EDGEGLM_DEVICE_FILES"


def facts(root: Path) -> dict[str, Any]:
    """Return what the sender needs to know before it sends anything."""
    files = Path(os.environ.get(FILES_VARIABLE, "/"))
    texts = {name: text for name in BOARD_FILES if (text := _text(files / name)) is not None}
    texts["var/lib/dpkg/status"] = _tensorrt_packages(files)
    texts["proc/cpuinfo"] = _first_core(files)
    return {
        "python": list(sys.version_info[:3]),
        "executable": sys.executable,
        "machine": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "hostname": platform.node(),
        "user": os.environ.get("USER", str(os.getuid())),
        "uid": os.getuid(),
        "time": time.time(),
        "root": str(root),
        "free_bytes": free_bytes(root),
        "board_files": texts,
        "gpu": _gpu(),
    }


def free_bytes(path: Path) -> int:
    """Return how many bytes may still be written where ``path`` is or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _gpu() -> dict[str, str] | None:
    """Return name and compute capability of the first discrete GPU, by nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        name, capability = (part.strip() for part in done.stdout.splitlines()[0].rsplit(",", 1))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return {"name": name, "sm": capability.replace(".", "")}


def _tensorrt_packages(files: Path) -> str:
    """Return the paragraphs of libnvinfer in Debian's list; the whole of it is megabytes."""
    paragraphs = (_text(files / "var/lib/dpkg/status") or "").split("\n\n")
    return "\n\n".join(one for one in paragraphs if one.startswith("Package: libnvinfer"))


def _first_core(files: Path) -> str:
    return (_text(files / "proc/cpuinfo") or "").split("\n\n", maxsplit=1)[0]


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return None
