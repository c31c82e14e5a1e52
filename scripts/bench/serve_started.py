"""The servers of the server's benchmark, as processes, and the lines of its page."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def started(command: list[str], address: str | None = None, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Run a server till the end of the block; gives what it says on stdout, or waits for ``address``."""
    stdout = subprocess.PIPE if address is None else subprocess.DEVNULL
    environment = {**ENVIRONMENT, **options.pop("env", {})}
    process = subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.DEVNULL, env=environment, start_new_session=True, **options
    )
    try:
        if address is None:
            assert process.stdout is not None
            text = b""
            while text.count(b"{") == 0 or text.count(b"{") != text.count(b"}"):
                text += process.stdout.readline()
            yield process, json.loads(text)
        else:
            host, _, port = address.rpartition(":")
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
                    break
                time.sleep(0.1)
            time.sleep(3)  # workers may still load
            yield process, None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """Find a port."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def ours(bundle: Path, *options: str) -> list[str]:
    """The server as people start it, with one thread an operator and no log of each request."""
    command = [sys.executable, "-m", "edgeglm.cli.main", "serve", str(bundle), "--json", "--threads", "1"]
    return [*command, "--port", "0", "--grpc-port", "0", "--no-access-log", *options]
