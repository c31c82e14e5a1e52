"""What several tests of deploys set up alike, and how they read what came of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from scripts.fixtures.colours import colour_bundle, colour_tower

ORIN_NANO = {
    "proc/device-tree/compatible": "nvidia,p3767-0003\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic",
    "proc/meminfo": "MemTotal: 7620000 kB\nMemAvailable: 6000000 kB\n",
}


def real_bundle(folder: Path, *, scale: float = 1.0, created: str = "2026-11-23") -> Path:
    """Two towers that embed colours; with scale -1 the goldens are wrong there."""
    parts: dict[str, Path | bytes] = {
        f"models/{variant}/{kind}.onnx": colour_tower(kind, scale=scale)
        for variant in ("fp32", "int8")
        for kind in ("image", "text")
    }
    return colour_bundle(folder, created, **parts)


def content(path: Path) -> str:
    """Return the content digest that a bundle states."""
    return str(json.loads((path / "manifest.json").read_bytes())["content_digest"])


def reason(summary, *, code: int = 2) -> str:
    """Return why the one device was not deployed to: with this code, and what to do in the last clause."""
    (one,) = summary.devices
    assert one.outcome == "failed", one
    assert (one.exit_code, summary.exit_code) == (code, code), one
    fact, _, remedy = one.reason.rpartition("; ")
    assert fact, one.reason
    assert len(remedy.split()) > 2, one.reason
    return str(one.reason)


def only(folder: Path, **programs: str | None) -> str:
    """Return a PATH on which a device finds a shell and these programs, and nothing else."""
    folder.mkdir()
    for name, path in {"sh": shutil.which("sh"), **programs}.items():
        assert path is not None
        (folder / name).symlink_to(path)
    return str(folder)


def program(path: Path, *lines: str, shell: str = "/bin/sh") -> Path:
    """Write a program that is these lines of shell, and return its path."""
    path.write_text("\n".join([f"#!{shell}", *lines, ""]))
    path.chmod(0o755)
    return path
