"""Keep a slot served: start it, ask whether it is ready, start it again when it is not.

    python -m edgeglm.deploy.device.supervise --state FILE [--log FILE] [--host H] [--port P]
        [--token-file FILE] [--standby]

Runs in the folder of a slot, under systemd or alone. Readiness is ``GET /v2/health/ready``. Under systemd it
says READY at the first yes and feeds the watchdog with each one after; alone it is the watchdog itself.
A program that ends is started again after a pause that doubles, from half a second to half a minute.
A log that both write to the end of is copied aside and emptied once it is long.

With ``--standby`` it and its program import what they need while another still serves, and wait for a line on
stdin before a model is opened: two models are never in memory. At the end of stdin both are gone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeglm.deploy.device.unit import PROGRAM_STOP_SECONDS, serve_command

READY_PATH = "/v2/health/ready"
_FIRST_PAUSE, _LONGEST_PAUSE, _CALM = 0.5, 30.0, 60.0
_EAGER_SECONDS, _QUIET_SECONDS = 0.05, 2.0
_UNREADY_SECONDS = 45.0
_START_SECONDS = 120.0  # as long as a deploy waits for one; longer where the deploy was told to wait longer
_LOG_BYTES = 4 << 20
_LINE_BYTES = 200
_LOOPBACKS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class Supervisor:
    """One supervised program."""

    def __init__(
        self, slot: Path, state: Path, *, host: str, port: int, log: Path | None = None, token: str = ""
    ) -> None:
        self._slot = slot
        self._log = log
        self._token = ["--token-file", token] if token else []
        self._state = state
        self._host = host
        self._port = port
        self._stop = threading.Event()
        self._waiting: tuple[subprocess.Popen[bytes], int] | None = None
        self._told = False  # systemd, that this is ready: only then does it wait for the watchdog
        self._words: dict[str, Any] = {
            "pid": os.getpid(),
            "slot": slot.name,
            "restarts": 0,
            "ready": False,
            "stands_by": True,  # this edgeglm knows how: the slot may be started so another time
        }

    def stop(self, *_: object) -> None:
        """End the program and then this."""
        self._stop.set()

    def stand_by(self) -> bool:
        """Start the program up to its imports; say whether a line came that lets it go on."""
        self._waiting = self._started("--when-told", stdin=subprocess.PIPE)
        if not sys.stdin.buffer.readline():
            _ended(self._waiting[0])
            return False
        return True

    def run(self) -> int:
        """Keep it running until ``stop``."""
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                code = self._once()
            except OSError as error:  # no memory for another process, say: who supervises must outlive it
                code = error.errno or 1
                with suppress(OSError):
                    sys.stderr.write(f"error: the server was not started: {error}; it is tried again\n")
            if self._stop.is_set():
                break
            pause = _FIRST_PAUSE if time.monotonic() - started > _CALM else min(2 * pause, _LONGEST_PAUSE)
            self._say(ready=False, exit=code, restarts=self._words["restarts"] + 1)
            self._stop.wait(pause)
        self._say(ready=False, stopped=True)
        return 0

    def _started(self, *more: str, stdin: int = subprocess.DEVNULL) -> tuple[subprocess.Popen[bytes], int]:
        """Start the program; return it and its port."""
        flags = _json(self._slot / "slot.json").get("serve_flags", [])
        port = self._port or _free_port(self._host)
        command = serve_command(
            sys.executable, host=self._host, port=port, flags=[*flags, *self._token, *more]
        )
        return subprocess.Popen(command, cwd=self._slot, stdin=stdin), port

    def _once(self) -> int:
        (child, port), self._waiting = self._waiting or self._started(), None
        if child.stdin is not None:
            with suppress(OSError), child.stdin:  # one that has ended is started again like any other
                child.stdin.write(b"\n")
        self._say(child=child.pid, port=port, host=self._host, since=time.time(), ready=False)
        last, answered, start = time.monotonic(), False, self._start_seconds()
        try:
            while child.poll() is None and not self._stop.is_set():
                ready, now = is_ready(self._host, port), time.monotonic()
                if ready:
                    last, answered, self._told = now, True, True
                    notify("READY=1\nWATCHDOG=1")
                    shortened(self._log)
                elif now - last > (_UNREADY_SECONDS if answered else start):
                    break
                elif self._told and not answered:
                    notify("WATCHDOG=1")  # it is started again, and that has a limit of its own
                if ready != self._words["ready"]:
                    self._say(ready=ready)
                self._stop.wait(_QUIET_SECONDS if ready else _EAGER_SECONDS)
        finally:
            _ended(child)
        return child.returncode

    def _start_seconds(self) -> float:
        """Return how long a program may take until it answers first."""
        waited = _json(self._slot / "slot.json").get("ready_seconds")
        return max(_START_SECONDS, waited) if isinstance(waited, (int, float)) else _START_SECONDS

    def _say(self, **changed: Any) -> None:
        self._words.update(changed)
        new = self._state.with_name(f".{self._state.name}.new")
        with suppress(OSError):  # a disk that is full must not end what is supervised
            new.write_text(json.dumps(self._words))
            new.chmod(0o644)
            new.replace(self._state)


def shortened(log: Path | None) -> None:
    """Keep a log and the one before it below a few megabytes each. Its writers append, so it stays theirs."""
    with suppress(OSError):  # a disk that is full must not end what is supervised
        if log is not None and log.stat().st_size > _LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".1.log"))
            os.truncate(log, 0)


def is_ready(host: str, port: int) -> bool:
    """Ask once whether the server takes requests."""
    place = _LOOPBACKS.get(host, host)
    name = f"[{place}]" if ":" in place else place
    question = f"GET {READY_PATH} HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n"
    try:  # by hand: http.client takes longer to import than all that is asked here
        with socket.create_connection((place, port), timeout=5) as talk, talk.makefile("rb") as answer:
            talk.sendall(question.encode())
            return answer.readline(_LINE_BYTES).split()[1:2] == [b"200"]
    except OSError:
        return False


def alive(pid: int) -> bool:
    """Say whether our supervisor runs as this process: numbers are used again, and the dead linger."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - on the way of every poll
            if file.read().rpartition(b")")[2].split()[0] == b"Z":
                return False
        with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
            return b"supervise" in file.read()
    except OSError:
        return False


def notify(text: str) -> None:
    """Tell systemd, as sd_notify(3) does; nothing without systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.sendall(text.encode())
        except OSError:
            return


def _ended(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(PROGRAM_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait()


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes())
    assert isinstance(found, dict)
    return found


def main() -> None:
    """Run one supervisor in this folder."""
    import argparse  # the agent, which imports this too, needs none of it

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token-file", default="")
    parser.add_argument("--standby", action="store_true")
    given = parser.parse_args()
    if os.getpgrp() != os.getpid():  # as some crons start it; the group is ended as a whole
        os.setpgid(0, 0)
    # The link may change while this runs: what was started stays with the slot it was started in.
    supervisor = Supervisor(
        Path.cwd().resolve(),
        given.state,
        host=given.host,
        port=given.port,
        log=given.log,
        token=given.token_file,
    )
    if given.standby and not supervisor.stand_by():  # a signal that ends it here ends its program's stdin
        return
    signal.signal(signal.SIGTERM, supervisor.stop)
    signal.signal(signal.SIGINT, supervisor.stop)
    sys.exit(supervisor.run())


if __name__ == "__main__":
    main()
