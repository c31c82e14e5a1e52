"""A unit of the system, or of the user, that keeps the current slot running."""

from __future__ import annotations

import grp
import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeglm.deploy.device.layout import Layout, read_json
from edgeglm.deploy.device.supervise import alive
from edgeglm.deploy.device.unit import UNIT_NAME, root_of_unit, unit_text
from edgeglm.deploy.device.wire import Refused

_GPU_GROUPS = ("video", "render")
_SECONDS = 120.0
_HIDDEN = ("/home", "/root", "/run/user")
_UNSAFE = frozenset("'\"\\")
_CREDENTIALS_SINCE = 247


class SystemdService:
    """A unit of the system, or of the user."""

    def __init__(self, layout: Layout, settings: dict[str, Any]) -> None:
        self._layout = layout
        self._settings = settings
        self._system = settings["service"] == "system"
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        self.unit = (Path("/etc/systemd/system") if self._system else home / "systemd/user") / UNIT_NAME
        self._state = Path("/run" if self._system else f"/run/user/{os.getuid()}") / "edgeglm/state.json"

    def check(self) -> None:
        """Raise Refused where systemd does not answer, or the unit may not be written."""
        if self._system and os.getuid() != 0:
            raise Refused(
                "a unit of the system needs root; connect as root, or pass --service user or process"
            )
        if any(one in _UNSAFE or not one.isprintable() for one in str(self._layout.root)):
            raise Refused(
                f"the root is {str(self._layout.root)!r}, and systemd runs no program with a quote or a "
                "backslash in its path; pass another --root, or --service process"
            )
        if (other := self._other_root()) is not None:
            raise Refused(
                f"{self.unit} on the device serves what lies in {other}; pass --root {other}, "
                f"or take that away first with 'edgeglm remove --root {other}'"
            )
        if self._system:
            self._check_places()
        self._systemctl("show-environment")
        if not self._system:
            self._check_lingering()

    def prepare(self) -> None:
        """Write the unit, let systemd read it, and have it started at boot.

        Where that is so already nothing is told: to read every unit anew takes as long as a server to end.
        """
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
            token_file=self._settings.get("token_file"),
        )
        if not self.unit.exists() or self.unit.read_text() != text:
            self.unit.parent.mkdir(parents=True, exist_ok=True)
            self.unit.write_text(text)
        told = self._told()
        if not told:
            self._systemctl("daemon-reload")
        if not self._system:
            _loginctl("enable-linger")
        if not told:
            self._systemctl("enable", UNIT_NAME)

    def restart(self) -> None:
        """Start the unit anew; this goes on without waiting."""
        self._systemctl("restart", "--no-block", UNIT_NAME)

    def stop(self) -> None:
        """Stop the unit."""
        self._systemctl("stop", UNIT_NAME)

    def remove(self) -> None:
        """Stop the unit and remove its file. Raises Refused where it goes on running."""
        if self._other_root() is not None:
            return
        try:
            self._systemctl("disable", "--now", UNIT_NAME)
        except Refused:
            if self.state():
                raise
        self.unit.unlink(missing_ok=True)
        with suppress(Refused):  # where there is no systemd any more, nothing has to be told
            self._systemctl("daemon-reload")

    def state(self) -> dict[str, Any]:
        """Return the supervisor's words if it lives."""
        found = read_json(self._state)
        pid = found.get("pid")
        return found if isinstance(pid, int) and alive(pid) else {}

    def log(self, lines: int) -> list[str]:
        """Return the end of its journal."""
        scope = [] if self._system else ["--user"]
        shown = ["-q", "--no-pager", "-o", "short-iso", "-n", str(lines)]
        command = ["journalctl", *scope, *shown, "-u", UNIT_NAME]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            raise Refused(f"journalctl on the device failed: {error}; mend it") from error
        return done.stdout.splitlines()

    def _other_root(self) -> Path | None:
        """Return the root that the unit serves where it is another one that is still there."""
        try:
            root = root_of_unit(self.unit.read_text())
        except OSError:
            return None
        return root if root is not None and root.is_dir() and not root.samefile(self._layout.root) else None

    def _check_places(self) -> None:
        """Raise Refused for what the unit of the system could not see or be handed."""
        named = {"the root": str(self._layout.root), "--python": self._settings.get("python")}
        for what, place in named.items():
            for path in {place, os.path.realpath(place)} if place else ():
                if any(Path(path).is_relative_to(hidden) for hidden in _HIDDEN):
                    raise Refused(
                        f"{what} is {path}, and a unit of the system sees nothing below {', '.join(_HIDDEN)} "
                        "(ProtectHome); put it elsewhere, such as below /opt or /var/lib, or pass --service "
                        "process"
                    )
        if self._settings.get("token_file") and 0 < (version := self._version()) < _CREDENTIALS_SINCE:
            raise Refused(
                f"systemd {version} on the device hands no token over (LoadCredential is of "
                f"{_CREDENTIALS_SINCE}); pass --service process, or leave --token-file out"
            )

    def _check_lingering(self) -> None:
        """Raise Refused where logind says that this user's units end when it logs out, and keeps it so."""
        for _ in range(2):
            if "Linger=no" not in _loginctl("show-user", str(os.getuid()), "--property=Linger"):
                return
            _loginctl("enable-linger")
        raise Refused(
            "units of this user end when it logs out, and it may not change that (loginctl enable-linger); "
            "let root do it there, or pass --service process"
        )

    def _version(self) -> int:
        """Return systemd's; 0 where it does not say."""
        found = re.match(r"systemd (\d+)", self._systemctl("--version"))
        return int(found[1]) if found else 0

    def _told(self) -> bool:
        """Say whether systemd has read the unit as it lies there, and starts it at boot."""
        names = ("LoadState", "NeedDaemonReload", "UnitFileState")
        said = self._systemctl("show", UNIT_NAME, *(f"--property={name}" for name in names))
        return set(said.split()) == {"LoadState=loaded", "NeedDaemonReload=no", "UnitFileState=enabled"}

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

    def _systemctl(self, *arguments: str) -> str:
        scope = [] if self._system else ["--user"]
        environment = {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **os.environ}
        command = ["systemctl", *scope, *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=_SECONDS, check=False
            )
        except FileNotFoundError as error:
            raise Refused("there is no systemctl on the device; pass --service process") from error
        except (OSError, subprocess.SubprocessError) as error:
            raise Refused(f"systemctl failed: {error}; mend it, or pass --service process") from error
        if done.returncode:
            words = " ".join(done.stderr.split()) or f"status {done.returncode}"
            raise Refused(f"systemctl {arguments[0]} failed: {words}; mend it, or pass --service process")
        return done.stdout


def _loginctl(*arguments: str) -> str:
    """Return what logind says; nothing where there is none."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["loginctl", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    return ""


def _group_exists(name: str) -> bool:
    with suppress(KeyError):
        grp.getgrnam(name)
        return True
    return False
