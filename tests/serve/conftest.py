"""Real servers, in processes of their own, on ports that were free."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.fixtures.colours import colour_bundle, colour_tower

TOKEN = "a-token-of-some-length"
PLAN = b'{"variants": {}}'


@dataclass
class Server:
    """A running server: where it listens and its process."""

    http: str
    grpc: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        return self.http.partition("//")[2]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def logged(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a line of the log; its thread writes some times a second."""
        for _ in range(100):
            found = next((event for event in self.events() if wanted(event)), None)
            if found is not None:
                return found
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())


def colours(folder: Path, *, scale: float = 1.0) -> Path:
    """A bundle of two small real towers."""
    parts: dict[str, bytes] = {
        f"models/{variant}/{kind}.onnx": colour_tower(kind, scale=scale)
        for variant in ("fp32", "int8")
        for kind in ("image", "text")
    }
    parts["precision_plan.json"] = PLAN
    return colour_bundle(folder, **parts)


@contextmanager
def running(log: Path, command: list[str], *, files: str = "", **environment: str) -> Iterator[Server]:
    """Run a server that prints where it listens as one JSON document; it must stop cleanly on SIGTERM.

    ``files`` are options of the shell's ``ulimit`` that it is started under, such as "-n 256".
    """
    shell = ["/bin/sh", "-c", f'ulimit {files}; exec "$@"', "sh"] if files else []
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*shell, sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    assert process.stdout is not None
    try:
        where = json.loads(_document(process, log))
        yield Server(where["http"], where["grpc"] or "", process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _document(process: subprocess.Popen[bytes], log: Path) -> bytes:
    assert process.stdout is not None
    text = b""
    while not text.endswith(b"\n}\n"):
        ready, _, _ = select.select([process.stdout], [], [], 60)
        part = os.read(process.stdout.fileno(), 65536) if ready else b""
        assert part, log.read_text()
        text += part
    return text


def serve_command(bundle: Path, *options: str) -> list[str]:
    return ["edgeglm.cli.main", "serve", str(bundle), "--port", "0", "--grpc-port", "0", "--json", *options]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bundles: ``colours``, and ``turned``, whose text tower answers with the opposite."""
    folder = tmp_path_factory.mktemp("bundles")
    colours(folder / "colours")
    colours(folder / "turned", scale=-1.0)
    return folder


@pytest.fixture(scope="session")
def server(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as people start it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running(log, serve_command(bundles / "colours")) as found:
        yield found


@pytest.fixture
def controlled(bundles: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that loads and unloads, behind a token."""
    options = ("--control", "--bundles", str(bundles))
    command = serve_command(bundles / "colours", *options)
    with running(tmp_path / "log", command, EDGEGLM_TOKEN=TOKEN) as found:
        yield found
