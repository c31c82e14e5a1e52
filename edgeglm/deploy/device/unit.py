"""The systemd unit, as text: one place that says what is run and what it may do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

UNIT_NAME = "edgeglm.service"

# A stop goes inwards, and whoever waits for another waits longer than that one may take, or it would be
# killed with requests that it still answers: the server drains for 30 s (edgeglm serve --drain-seconds), the
# supervisor waits for the server, and who stops the supervisor, systemd included, for the supervisor.
PROGRAM_STOP_SECONDS = 40.0
SUPERVISOR_STOP_SECONDS = 50.0
_UNIT_STOP_SECONDS = 60
_FILES = 8192
"""Above the connections that the server accepts (4096), with room for what it opens itself."""
_PLAIN = re.compile(r"[A-Za-z0-9_@./:=,+-]+")
Scope = Literal["system", "user"]


def serve_command(python: str, *, host: str, port: int, flags: Sequence[str] = ()) -> list[str]:
    """Return what is supervised, to be started in the folder of a slot. The one place that says so."""
    return [python, "-m", "edgeglm.cli.main", "serve", "bundle", "--host", host, "--port", str(port), *flags]


def supervise_command(
    python: str, *, host: str, port: int, state: str, log: str = "", standby: bool = False
) -> list[str]:
    """Return what keeps it running: restarts with back-off, and tells systemd when it answers.

    ``log`` is the file that all of it writes to, which is then kept from growing; systemd has a journal. With
    ``standby`` it waits for a line on stdin before anything is loaded.
    """
    module = "edgeglm.deploy.device.supervise"
    command = [python, "-m", module, "--host", host, "--port", str(port), "--state", state]
    return [*command, *(["--log", log] if log else []), *(["--standby"] if standby else [])]


def unit_text(
    scope: Scope,
    root: Path,
    *,
    host: str,
    port: int,
    state: str,
    gpu: bool,
    groups: Sequence[str] = (),
    memory: str = "75%",
    trust: str | None = None,
    token_file: str | None = None,
) -> str:
    """Return the unit.

    Args:
        scope: "system" runs as a user that exists only while it runs; "user" as whoever deployed.
        root: Where the slots lie; the unit only reads there.
        host: The address to listen on.
        port: The port.
        state: The file in which the supervisor says how it is.
        gpu: Whether it needs devices; without one it sees none.
        groups: Groups that may use the GPU and that exist there.
        memory: The most it may take.
        trust: The folder of trusted keys that the bundle was held against.
        token_file: The file with the server's token. In the system's unit systemd reads it, as root, and
            hands it over: the unit's own user comes and goes and can own no file.
    """
    handed_over = token_file is not None and scope == "system"
    command = supervise_command(f"{root}/current/environment/bin/python", host=host, port=port, state=state)
    words = [quoted(word) for word in command]
    words += ["--token-file", "${CREDENTIALS_DIRECTORY}/token"] if handed_over else []  # %d is of systemd 250
    lines = [
        "# Written by edgeglm deploy; the next deploy writes it anew. Change it with systemctl edit.",
        "[Unit]",
        "Description=edgeglm, serving a bundle",
        "After=network.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"WorkingDirectory={_plain(root)}/current",
        f"ExecStart={' '.join(words)}",
        *([f"LoadCredential=token:{_plain(token_file)}"] if handed_over else []),
        "Environment=PYTHONDONTWRITEBYTECODE=1",
        "Environment=HOME=%t/edgeglm",
        *([f"Environment={quoted(f'EDGEGLM_TRUST={trust}')}"] if trust else []),
        "RuntimeDirectory=edgeglm",
        "RuntimeDirectoryMode=0755",
        "# READY comes with the first answer of /v2/health/ready, the watchdog is fed by each one after.",
        "TimeoutStartSec=600",
        "WatchdogSec=60",
        "Restart=always",
        "RestartSec=2",
        "KillMode=mixed",
        f"TimeoutStopSec={_UNIT_STOP_SECONDS}",
        f"MemoryMax={memory}",
        "TasksMax=512",
        f"LimitNOFILE={_FILES}",
        "OOMPolicy=stop",
        "UMask=0077",
        "NoNewPrivileges=yes",
        "LockPersonality=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "RestrictNamespaces=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallFilter=~@privileged @resources" if not gpu else "SystemCallFilter=~@privileged",
        "# ONNX Runtime ties its threads to cores. What else is asked for (mbind, by OpenBLAS) fails and",
        "# kills nothing.",
        "SystemCallFilter=sched_setaffinity",
        "SystemCallErrorNumber=EPERM",
    ]
    if scope == "system":
        lines += [
            "DynamicUser=yes",
            *([f"SupplementaryGroups={' '.join(groups)}"] if groups else []),
            "ProtectSystem=strict",
            "ProtectHome=yes",
            "PrivateTmp=yes",
            "ProtectKernelTunables=yes",
            "ProtectKernelModules=yes",
            "ProtectKernelLogs=yes",
            "ProtectControlGroups=yes",
            "ProtectClock=yes" if not gpu else "ProtectClock=no",  # it would close every device node
            "ProtectHostname=yes",
            "ProtectProc=invisible",
            "ProcSubset=all",  # the board is read from /proc
            "RemoveIPC=yes",
            "CapabilityBoundingSet=",
            "AmbientCapabilities=",
            "PrivateDevices=no" if gpu else "PrivateDevices=yes",
            "PrivateUsers=no" if gpu else "PrivateUsers=yes",
        ]
        if not gpu:
            lines.append("DevicePolicy=closed")
    wanted = "multi-user.target" if scope == "system" else "default.target"
    return "\n".join([*lines, "", "[Install]", f"WantedBy={wanted}", ""])


def root_of_unit(text: str) -> Path | None:
    """Return the root that a unit of ``unit_text`` serves; None for any other."""
    found = re.search(r"^WorkingDirectory=(.*)/current$", text, re.MULTILINE)
    return None if found is None else Path(found[1].replace("%%", "%"))


def quoted(word: str) -> str:
    """Return a word of a unit's line that systemd reads as it is, spaces and ``%`` included."""
    if _PLAIN.fullmatch(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_plain(escaped)}"'


def _plain(text: object) -> str:
    """Return the rest of a line, in which only ``%`` means something."""
    return str(text).replace("%", "%%")
