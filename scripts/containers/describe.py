"""What a Containerfile would make, and what is wrong with it, without an engine that builds one.

    .venv/bin/python scripts/containers/describe.py scripts/containers/Containerfile.x86_64

Prints a JSON object: base, files with their digests, commands, environment, user, ports, what is run. Exits
with 1 and the faults when there are any. The file is read by dockerfile-parse; the rules are those that have
a reason here, each of them in its message.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_LEFT_OUT = ("__pycache__",)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return (instruction, value) in order, with the ARGs that have a default put in."""
    import io

    from dockerfile_parse import DockerfileParser

    parser = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))
    found, defaults = [], {}
    for part in parser.structure:
        name, value = part["instruction"], part["value"]
        if name == "COMMENT":
            continue
        for argument, default in defaults.items():
            value = re.sub(rf"\$\{{{argument}\}}", default, value)
        if name == "ARG" and "=" in value:
            argument, _, default = value.partition("=")
            defaults[argument] = default
        found.append((name, value))
    return found


def description(path: Path) -> dict[str, Any]:
    """Return what the Containerfile says, with the sha256 of every file of the checkout that it copies."""
    steps = instructions(path)
    sources = [source for value in _values(steps, "COPY") for source in value.split()[:-1]]
    return {
        "base": _one(steps, "FROM"),
        "files": {name: _digest(file) for source in sources for name, file in _files(source)},
        "run": _values(steps, "RUN"),
        "environment": _values(steps, "ENV"),
        "user": _one(steps, "USER"),
        "ports": _values(steps, "EXPOSE"),
        "health": _one(steps, "HEALTHCHECK"),
        "entrypoint": _words(_one(steps, "ENTRYPOINT")),
        "command": _words(_one(steps, "CMD")),
    }


def faults(path: Path) -> list[str]:
    """Return what is wrong, each with its reason."""
    steps = instructions(path)
    found = []
    base = _one(steps, "FROM") or ""
    if not re.search(r":[^/]*\d|@sha256:", base) or base.endswith(":latest"):
        found.append(f"the base {base!r} names no version: another day gives another image")
    user = _one(steps, "USER") or "root"
    if user.split(":")[0] in ("root", "0"):
        found.append("it runs as root: a fault in a parser would own the container")
    for value in _values(steps, "COPY"):
        for source in value.split()[:-1]:
            if source == "." or not (ROOT / source).exists():
                found.append(f"COPY {source}: not a part of this checkout, or all of it, secrets included")
    for value in _values(steps, "RUN"):
        if re.search(r"pip install[^&]* -r ", value) and "--require-hashes" not in value:
            found.append("pip installs a list without --require-hashes: what comes is not what was locked")
        if "apt-get install" in value and "rm -rf /var/lib/apt/lists" not in value:
            found.append("apt's lists stay in the layer: megabytes that nobody reads")
        if re.search(r"curl .*\| *(ba)?sh|wget .*\| *(ba)?sh", value):
            found.append("it runs what it has just downloaded: nobody has read that")
    for name, value in steps:
        if name == "ADD":
            found.append(f"ADD {value}: it unpacks and downloads by itself; use COPY")
        if name in ("ENV", "ARG") and re.search(r"(TOKEN|SECRET|PASSWORD|KEY)\w*=", value):
            found.append(f"{name} {value.partition('=')[0]}: a secret in a layer is no secret; mount a file")
    for name in ("ENTRYPOINT", "CMD"):
        if _words(_one(steps, name)) is None:
            found.append(f"{name} is absent or no JSON list: a shell in between swallows SIGTERM")
    health = _one(steps, "HEALTHCHECK") or ""
    if "/v2/health/ready" not in health:
        found.append("the health check does not ask /v2/health/ready")
    command = _words(_one(steps, "CMD")) or []
    port = command[command.index("--port") + 1] if "--port" in command else ""
    if port not in " ".join(_values(steps, "EXPOSE")).split() or f":{port}/" not in health:
        found.append(f"port {port or '-'} of the command is not the one that is exposed and asked for health")
    return found


def _values(steps: list[tuple[str, str]], name: str) -> list[str]:
    return [value for instruction, value in steps if instruction == name]


def _one(steps: list[tuple[str, str]], name: str) -> str | None:
    return next(reversed(_values(steps, name)), None)


def _words(value: str | None) -> list[str] | None:
    try:
        words = json.loads(value or "")
    except ValueError:
        return None
    return words if isinstance(words, list) else None


def _files(source: str) -> Iterator[tuple[str, Path]]:
    place = ROOT / source
    paths = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    for path in paths:
        if not any(part in _LEFT_OUT for part in path.parts):
            yield path.relative_to(ROOT).as_posix(), path


def _digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Print descriptions, or faults."""
    code = 0
    for name in sys.argv[1:]:
        wrong = faults(Path(name))
        for fault in wrong:
            sys.stderr.write(f"{name}: {fault}\n")
            code = 1
        if not wrong:
            sys.stdout.write(json.dumps(description(Path(name)), indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
