"""What keeps the current slot running: systemd, the user's systemd, cron, or a plain supervised process."""

from __future__ import annotations

import grp
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from edgeglm.deploy.device.crontab import boot_line, install_line, remove_line
from edgeglm.deploy.device.layout import Layout, read_json
from edgeglm.deploy.device.supervise import is_ready
from edgeglm.deploy.device.unit import UNIT_NAME, supervise_command, unit_text
from edgeglm.deploy.device.wire import Refused

Kind = Literal["system", "user", "cron", "process"]

_GPU_GROUPS = ("video", "render")
_LOG_BYTES = 4 << 20
_POLL_SECONDS = 0.02
_STOP_SECONDS = 25.0
_HOPELESS_RESTARTS = 2


class Service(Protocol):
    """One way to keep it running."""

    def restart(self) -> None:
        """Stop what runs and start the current slot."""

    def stop(self) -> None:
        """Stop what runs."""

    def remove(self) -> None:
        """Stop it and leave nothing of it behind."""

    def state(self) -> dict[str, Any]:
        """Return what the supervisor says of itself; nothing where none runs."""

    def log(self, lines: int) -> list[str]:
        """Return the last lines that it wrote."""


def best_kind() -> Kind:
    """Return the best way there is here that changes no file of the user's own: cron must be asked for."""
    if Path("/run/systemd/system").is_dir() and shutil.which("systemctl"):
        if os.getuid() == 0:
            return "system"
        if Path(f"/run/user/{os.getuid()}/systemd/private").exists():
            return "user"
    return "process"


def service_for(layout: Layout, settings: dict[str, Any]) -> Service:
    """Return the service that ``device.json`` describes."""
    kind = settings.get("service", "process")
    if kind == "process":
        return ProcessService(layout, settings)
    if kind == "cron":
        return CronService(layout, settings)
    return SystemdService(layout, settings)


def wait_ready(service: Service, slot: str, seconds: float) -> str | None:
    """Wait until the service is ready with a slot; return why it will not be, or None.

    A program that has ended more than once is not waited for any longer.
    """
    end = time.monotonic() + seconds
    while True:
        state = service.state()
        if state.get("slot") == slot:
            if state.get("ready") and is_ready(state["host"], state["port"]):
                return None
            if state.get("restarts", 0) >= _HOPELESS_RESTARTS:
                return f"it ended with status {state.get('exit')}, {state['restarts']} times"
        if time.monotonic() > end:
            return f"it did not answer within {seconds:g} s"
        time.sleep(_POLL_SECONDS)


class ProcessService:
    """A process of its own session, where there is no systemd. It does not come back after a reboot."""

    def __init__(self, layout: Layout, settings: dict[str, Any]) -> None:
        self._layout = layout
        self._settings = settings
        self._state = layout.run / "state.json"
        self._log = layout.run / "service.log"
        self._child: subprocess.Popen[bytes] | None = None

    def restart(self) -> None:
        """Stop the former supervisor and start one in the current slot."""
        self.stop()
        slot = (self._layout.root / "current").resolve()
        command, environment = self._command(slot)
        if self._log.exists() and self._log.stat().st_size > _LOG_BYTES:
            self._log.replace(self._log.with_suffix(".1.log"))
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                command,
                cwd=slot,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ask it to end, and make it."""
        pid = self._running()
        if pid is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(pid, number)
                end = time.monotonic() + _STOP_SECONDS
                while _alive(pid) and time.monotonic() < end:
                    time.sleep(_POLL_SECONDS)
                if not _alive(pid):
                    break
        self._state.unlink(missing_ok=True)

    def remove(self) -> None:
        """Stop it; its files go with the root."""
        self.stop()

    def state(self) -> dict[str, Any]:
        """Return the supervisor's words if it lives; of one that ended at once, that it did."""
        if self._running() is not None:
            return read_json(self._state)
        if self._child is not None and self._child.poll() is not None:
            slot = self._layout.pointed("current")
            return {"slot": slot, "restarts": _HOPELESS_RESTARTS, "exit": self._child.returncode}
        return {}

    def log(self, lines: int) -> list[str]:
        """Return the end of its log file."""
        try:
            return self._log.read_text("utf-8", "replace").splitlines()[-lines:]
        except OSError:
            return []

    def _command(self, slot: Path) -> tuple[list[str], dict[str, str]]:
        """Return what is started in a slot, and its environment."""
        # That of the session goes no further: it may hold what is nobody's business.
        kept = ("HOME", "PATH", "LANG", "USER", "LD_LIBRARY_PATH", "EDGEGLM_TRUST", "TMPDIR")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        command = supervise_command(
            str(slot / "environment" / "bin" / "python"),
            host=self._settings["host"],
            port=self._settings["port"],
            state=str(self._state),
            log=str(self._log),
        )
        return command, {**environment, "PYTHONDONTWRITEBYTECODE": "1"}

    def _running(self) -> int | None:
        pid = read_json(self._state).get("pid")
        return pid if isinstance(pid, int) and _alive(pid) else None


class CronService(ProcessService):
    """The same, with a line in the user's crontab that starts it after a reboot."""

    def restart(self) -> None:
        """Write the line, then start the current slot."""
        command, environment = self._command(self._layout.root / "current")
        install_line(self._layout.root, boot_line(self._layout.root, command, environment, self._log))
        super().restart()

    def remove(self) -> None:
        """Take the line away and stop it."""
        remove_line(self._layout.root)
        super().remove()


class SystemdService:
    """A unit of the system, or of the user."""

    def __init__(self, layout: Layout, settings: dict[str, Any]) -> None:
        self._layout = layout
        self._settings = settings
        self._system = settings["service"] == "system"
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        self.unit = (Path("/etc/systemd/system") if self._system else home / "systemd/user") / UNIT_NAME
        self._state = Path("/run" if self._system else f"/run/user/{os.getuid()}") / "edgeglm/state.json"

    def restart(self) -> None:
        """Write the unit, let systemd read it, and start it anew; it goes on without waiting."""
        text = unit_text(
            "system" if self._system else "user",
            self._layout.root,
            host=self._settings["host"],
            port=self._settings["port"],
            state=str(self._state),
            gpu=bool(self._settings.get("gpu")),
            groups=[name for name in _GPU_GROUPS if _group_exists(name)] if self._settings.get("gpu") else [],
            memory=self._settings.get("memory", "75%"),
            trust=self._trust(),
        )
        if not self.unit.exists() or self.unit.read_text() != text:
            self.unit.parent.mkdir(parents=True, exist_ok=True)
            self.unit.write_text(text)
        self._systemctl("daemon-reload")
        if not self._system:  # else it ends when its user logs out
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["loginctl", "enable-linger"], capture_output=True, timeout=20, check=False)
        self._systemctl("enable", UNIT_NAME)
        self._systemctl("restart", "--no-block", UNIT_NAME)

    def stop(self) -> None:
        """Stop the unit."""
        self._systemctl("stop", UNIT_NAME)

    def remove(self) -> None:
        """Stop the unit and remove its file."""
        with suppress(Refused):
            self._systemctl("disable", "--now", UNIT_NAME)
        self.unit.unlink(missing_ok=True)
        self._systemctl("daemon-reload")

    def state(self) -> dict[str, Any]:
        """Return the supervisor's words if it lives."""
        found = read_json(self._state)
        pid = found.get("pid")
        return found if isinstance(pid, int) and _alive(pid) else {}

    def log(self, lines: int) -> list[str]:
        """Return the end of its journal."""
        scope = [] if self._system else ["--user"]
        command = ["journalctl", *scope, "--no-pager", "-o", "short-iso", "-u", UNIT_NAME, "-n", str(lines)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout.splitlines()

    def _trust(self) -> str | None:
        """Return a folder with the deployer's trusted keys that the unit may read; None if there are none."""
        named = os.environ.get("EDGEGLM_TRUST")
        folder = Path(named) if named else Path.home() / ".config/edgeglm/trust"
        place = self._layout.root / "trust"
        shutil.rmtree(place, ignore_errors=True)
        keys = sorted(folder.glob("*.pub"))
        for key in keys:
            place.mkdir(exist_ok=True)
            shutil.copyfile(key, place / key.name)
        return str(place) if keys else None

    def _systemctl(self, *arguments: str) -> None:
        scope = [] if self._system else ["--user"]
        environment = {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **os.environ}
        done = subprocess.run(
            ["systemctl", *scope, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        if done.returncode:
            words = " ".join(done.stderr.split()) or f"status {done.returncode}"
            raise Refused(f"systemctl {arguments[0]} failed: {words}; mend it, or pass --service process")


def _alive(pid: int) -> bool:
    """Say whether our supervisor runs as this process: numbers are used again, and the dead linger."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - on the way of every poll
            if file.read().rpartition(b")")[2].split()[0] == b"Z":
                return False
        with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
            return b"supervise" in file.read()
    except OSError:
        return False


def _group_exists(name: str) -> bool:
    with suppress(KeyError):
        grp.getgrnam(name)
        return True
    return False
