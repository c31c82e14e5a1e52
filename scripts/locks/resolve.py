"""Remake the locks: exact versions and hashes for each half, Python and architecture.

pip resolves, for another Python or architecture too (`--python-version`, `--platform`). It reads
environment markers with the interpreter it runs on, though, so what a marker adds elsewhere is
found here by reading the metadata of the result, and resolved again until nothing is missing.

A lock names versions and sha256 only, never where a file came from. It leaves out:

- torch, and the CUDA packages and triton that torch's wheel asks for. A machine may offer a CPU
  wheel of the same version under another hash; scripts/setup installs torch by version.
- what `UNUSED` lists: dependencies by declaration that no code path of ours imports.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomllib
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
LOCKS = {
    "host": [("3.11", "x86_64"), ("3.12", "x86_64"), ("3.13", "x86_64")],
    "device": [
        ("3.10", "aarch64"),
        ("3.10", "x86_64"),
        ("3.11", "aarch64"),
        ("3.11", "x86_64"),
        ("3.12", "aarch64"),
        ("3.12", "x86_64"),
        ("3.13", "x86_64"),
    ],
}
EXTRAS = {"host": ("build", "dev", "serve", "traces"), "device": ("device", "serve", "sign")}
UNUSED = {
    "host": {
        "cppimport": "compiles ModelOpt's fast INT4 path; sdist only",
        "cupy-cuda12x": "INT4 on a GPU; 120 MB and useless without CUDA",
        "ninja": "compiles ModelOpt's torch extensions",
        "pulp": "ModelOpt's search over per-layer formats",
    },
    "device": {
        "coloredlogs": "onnxruntime's tools, never its import",
        "huggingface-hub": "tokenizers' downloads; ours reads a local file",
        "sympy": "onnxruntime's shape tools, never its import",
    },
}
TORCH_OWN = re.compile(r"triton|cuda-.*|nvidia-(?!modelopt|ml-py).*")
GLIBC_MINORS = range(35, 16, -1)  # Ubuntu 22.04 (JetPack 6) has 2.35; newer first, as pip orders them


def main(names: Iterable[str]) -> None:
    """Write every lock, or only those named."""
    wanted = set(names)
    for half, places in LOCKS.items():
        for python, machine in places:
            path = HERE / f"{half}-py{python.replace('.', '')}-{machine}.txt"
            if wanted and path.stem not in wanted:
                continue
            lines = lock(half, python, machine)
            title = f"# The {half} half on Python {python}, {machine}. Made by scripts/lock; do not edit.\n"
            path.write_text(title + "".join(lines))
            sys.stdout.write(f"{path.name}: {len(lines)} packages\n")


def lock(half: str, python: str, machine: str) -> list[str]:
    """Return the lines of one lock."""
    environment = {
        **{key: str(value) for key, value in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "extra": "",
    }
    roots = roots_of(half, environment)
    asked = {str(root) for root in roots}
    while True:
        found = resolved(asked, python, machine)
        kept, missing = reachable(roots, found, environment, UNUSED[half])
        if not missing:
            break
        asked |= missing
    return [_line(found[name]) for name in sorted(kept)]


def roots_of(half: str, environment: dict[str, str]) -> list[Requirement]:
    """Return what pyproject.toml asks for: to build, to run, and the half's extras."""
    project = tomllib.loads((HERE.parent.parent / "pyproject.toml").read_text("utf-8"))
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in EXTRAS[half]:
        lines += project["project"]["optional-dependencies"][extra]
    roots = [Requirement(line) for line in lines]
    return [root for root in roots if root.marker is None or root.marker.evaluate(environment)]


def resolved(asked: Iterable[str], python: str, machine: str) -> dict[str, Any]:
    """Let pip choose; return its report by canonical name."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS] + [f"manylinux2014_{machine}"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--only-binary", ":all:", "--python-version", python, "--target", folder]
        command += [part for tag in tags for part in ("--platform", tag)]
        command += ["--report", str(report), *sorted({_without_marker(line) for line in asked})]
        subprocess.run(command, check=True)
        items = json.loads(report.read_bytes())["install"]
    return {canonicalize_name(item["metadata"]["name"]): item for item in items}


def reachable(
    roots: list[Requirement], found: dict[str, Any], environment: dict[str, str], unused: Iterable[str]
) -> tuple[set[str], set[str]]:
    """Walk the metadata with the target's markers; return what to lock and what pip did not see."""
    kept: set[str] = set()
    missing: set[str] = set()
    walked: set[tuple[str, str]] = set()
    queue = list(roots)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in unused or TORCH_OWN.fullmatch(name):
            continue
        if name not in found:
            missing.add(str(requirement))
            continue
        if name != "torch":
            kept.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) in walked:
                continue
            walked.add((name, extra))
            needs = map(Requirement, found[name]["metadata"].get("requires_dist", []))
            here = {**environment, "extra": extra}
            queue += [need for need in needs if need.marker is None or need.marker.evaluate(here)]
    return kept, missing


def _without_marker(line: str) -> str:
    requirement = Requirement(line)
    requirement.marker = None
    if canonicalize_name(requirement.name) == "nvidia-modelopt":
        # Its extra has parts without wheels; those we use come in through `missing`.
        requirement.extras = set()
    return str(requirement)


def _line(item: dict[str, Any]) -> str:
    name = canonicalize_name(item["metadata"]["name"])
    digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{name}=={item['metadata']['version']} --hash=sha256:{digest}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
