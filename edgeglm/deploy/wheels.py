"""What a device needs of Python when it has no internet: edgeglm's wheel and its locked dependencies.

The wheel is built on the spot from the checkout; the others are those of the device half's lock for the
device's Python and architecture, held to the lock's digests, downloaded once and kept in the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeglm.core.digest import sha256_file, sha256_json
from edgeglm.core.errors import UserError

PIP = "pip==26.3"
_PARTS = ("edgeglm", "export", "calibration", "targets")
_FILES = ("pyproject.toml", "README.md", "LICENSE")
_EPOCH = "315532800"  # 1980, the oldest time a zip knows: the same source gives the same wheel


@dataclass(frozen=True, kw_only=True)
class Wheels:
    """``files``: ``{file name: (sha256, path)}``. ``name`` is the digest of the environment they make."""

    name: str
    files: Mapping[str, tuple[str, Path]]


def wheels_for(python: tuple[int, int], machine: str, glibc: str, store: Path) -> Wheels:
    """Return everything for one kind of device. Raises UserError where something cannot be had."""
    source = checkout()
    tag = f"py{python[0]}{python[1]}-{machine}"
    lock = source / "scripts" / "locks" / f"device-{tag}.txt"
    if not lock.is_file():
        known = sorted(path.stem.removeprefix("device-") for path in lock.parent.glob("device-*.txt"))
        raise UserError(
            f"edgeglm has no locked wheels for Python {python[0]}.{python[1]} on {machine} (it has "
            f"{', '.join(known)}); install edgeglm there yourself and pass --python"
        )
    paths = [built_wheel(source, store), *_downloaded(lock, python, machine, glibc, store)]
    files = {path.name: (sha256_file(path), path) for path in sorted(paths)}
    name = sha256_json(
        {"wheels": {file: digest for file, (digest, _) in files.items()}, "python": list(python)}
    )
    return Wheels(name=name, files=files)


def checkout() -> Path:
    """Return the root of the checkout this runs from. Raises UserError when it runs from elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / "scripts" / "locks").is_dir():
        raise UserError(
            "this edgeglm was not installed from a checkout, so its wheel and locks are not at hand; "
            "deploy from a checkout (scripts/setup), or pass --python of an environment on the device"
        )
    return root


def built_wheel(source: Path, store: Path) -> Path:
    """Return edgeglm's wheel, built if its source has changed since. The checkout is left as it is."""
    digest = _source_digest(source)
    place = store / "deploy" / "edgeglm" / digest
    if found := sorted(place.glob("*.whl")):
        return found[0]
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        copy = Path(scratch) / "source"
        copy.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for part in _PARTS:
            shutil.copytree(source / part, copy / part, symlinks=True, ignore=ignored)
        for name in _FILES:
            shutil.copyfile(source / name, copy / name)
        out = Path(scratch) / "wheel"
        out.mkdir()
        build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", build, str(out)],
            cwd=copy,
            env={**os.environ, "SOURCE_DATE_EPOCH": _EPOCH},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            words = "; ".join(done.stderr.strip().splitlines()[-3:])
            raise UserError(f"cannot build edgeglm's wheel ({words}); install setuptools here")
        if not place.exists():
            out.rename(place)
    return next(iter(sorted(place.glob("*.whl"))))


def _source_digest(source: Path) -> str:
    digest = hashlib.sha256()
    for part in (*_PARTS, *_FILES):
        top = source / part
        paths = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for path in paths:
            if "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(source)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _downloaded(lock: Path, python: tuple[int, int], machine: str, glibc: str, store: Path) -> list[Path]:
    """Download the lock's wheels once; afterwards no network is needed for this kind of device."""
    wanted = sha256_json({"lock": sha256_file(lock), "pip": PIP, "glibc": glibc})
    place = store / "deploy" / "wheels" / wanted
    if (place / "complete.json").is_file():
        return sorted(place.glob("*.whl"))
    place.mkdir(parents=True, exist_ok=True)
    newest = int(glibc.split(".")[1]) if glibc.startswith("2.") else 35
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 16, -1)] + [
        f"manylinux2014_{machine}"
    ]
    platforms = [part for tag in tags for part in ("--platform", tag)]
    base = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    version = f"{python[0]}.{python[1]}"
    options = ["--only-binary", ":all:", "--python-version", version, *platforms, "-d", str(place)]
    for what in (["--require-hashes", "-r", str(lock)], [PIP]):
        done = subprocess.run([*base, *options, *what], capture_output=True, text=True, check=False)
        if done.returncode:
            words = "; ".join(done.stderr.strip().splitlines()[-2:])
            raise UserError(
                f"cannot download the wheels of {lock.name} ({words}); "
                "connect this machine to a package index once, or pass --python of one on the device"
            )
    (place / "complete.json").write_text(json.dumps({"lock": lock.name}))
    return sorted(place.glob("*.whl"))
