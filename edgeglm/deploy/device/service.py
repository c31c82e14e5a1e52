"""What keeps the current slot running: systemd, the user's systemd, cron, or a plain supervised process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from edgeglm.deploy.device.crontab import boot_line, check_crontab, install_line, remove_line
from edgeglm.deploy.device.layout import Layout, read_json
from edgeglm.deploy.device.supervise import alive, is_ready
from edgeglm.deploy.device.systemd import SystemdService
from edgeglm.deploy.device.unit import SUPERVISOR_STOP_SECONDS, supervise_command

Kind = Literal["system", "user", "cron", "process"]

_LOG_BYTES = 4 << 20
_POLL_SECONDS = 0.02
_HOPELESS_RESTARTS = 2


class Service(Protocol):
    """One way to keep it running."""

    def check(self) -> None:
        """Raise Refused where this way is not to be had; nothing is changed."""

    def prepare(self) -> None:
        """Write what a start needs and a reboot reads; what runs is left alone. Raises Refused, OSError."""

    def restart(self) -> None:
        """Stop what runs and start the current slot. Raises Refused, OSError."""

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

    def check(self) -> None:
        """Do nothing: processes can be had everywhere."""

    def prepare(self) -> None:
        """Do nothing: nothing outlives a reboot."""

    def restart(self) -> None:
        """Stop the former supervisor and start one in the current slot.

        Where the slot is known to be able to, its program imports what it needs while the former one ends,
        and opens its models after that.
        """
        slot = (self._layout.root / "current").resolve()
        running = self._running()
        standby = running is not None and self._layout.record(slot.name).get("stands_by") is True
        if not standby:
            self.stop()
        self._child = self._started(slot, standby=standby)
        if self._child.stdin is not None:
            try:
                self.stop()
                with suppress(OSError):  # it has ended, and says so by its status
                    self._child.stdin.write(b"\n")
            finally:
                with suppress(OSError):
                    self._child.stdin.close()

    def stop(self) -> None:
        """Ask it to end, and make it; and whatever a start that was killed has left."""
        for pid in self._all_running():
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(pid, number)
                end = time.monotonic() + SUPERVISOR_STOP_SECONDS
                while alive(pid) and time.monotonic() < end:
                    time.sleep(_POLL_SECONDS)
                if not alive(pid):
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

    def _started(self, slot: Path, *, standby: bool) -> subprocess.Popen[bytes]:
        command, environment = self._command(slot, standby=standby)
        if self._log.exists() and self._log.stat().st_size > _LOG_BYTES:
            self._log.replace(self._log.with_suffix(".1.log"))
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=slot,
                env=environment,
                stdin=subprocess.PIPE if standby else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                bufsize=0,
            )

    def _command(self, slot: Path, *, standby: bool = False) -> tuple[list[str], dict[str, str]]:
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
            standby=standby,
        )
        return command, environment

    def _all_running(self) -> list[int]:
        """Return every supervisor of this root: one whose starter was killed may not have said that it runs.

        The one that stands by for this start is none of them.
        """
        wanted = b"\0--state\0" + os.fsencode(self._state) + b"\0"
        own = self._child.pid if self._child is not None else None
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            with suppress(OSError):
                if pid != own and wanted in (folder / "cmdline").read_bytes() and alive(pid):
                    found.append(pid)
        return found

    def _running(self) -> int | None:
        pid = read_json(self._state).get("pid")
        return pid if isinstance(pid, int) and alive(pid) else None


class CronService(ProcessService):
    """The same, with a line in the user's crontab that starts it after a reboot."""

    def check(self) -> None:
        """Raise Refused where there is no crontab."""
        check_crontab()

    def prepare(self) -> None:
        """Write the line."""
        command, environment = self._command(self._layout.root / "current")
        install_line(self._layout.root, boot_line(self._layout.root, command, environment, self._log))

    def remove(self) -> None:
        """Take the line away and stop it."""
        remove_line(self._layout.root)
        super().remove()
