"""What the user's SSH configuration says of a device, taken as ``ssh`` takes it, and whom it trusts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeglm.core.errors import UserError
from edgeglm.deploy.hosts import HostName
from edgeglm.deploy.ssh import asyncssh_module

if TYPE_CHECKING:
    import asyncssh

ALIVE_SECONDS, ALIVE_COUNT = 15, 4


def ssh_options(host: HostName, seconds: float) -> asyncssh.SSHClientConnectionOptions:
    """Return the options of a connection. Raises UserError where they cannot be read or check no host key."""
    ssh = asyncssh_module()
    given = {
        "host": host.host,
        "username": host.user or (),
        "port": host.port or (),
        "config": (),
        "password": None,
        "preferred_auth": "publickey",
        "connect_timeout": seconds,
        "login_timeout": seconds,
        "keepalive_interval": ALIVE_SECONDS,
        "keepalive_count_max": ALIVE_COUNT,
        "request_pty": False,  # RequestTTY is for people: a terminal would change the bytes on their way
    }
    try:
        read = ssh.SSHClientConnectionOptions(**given, client_keys=None)
        changed = {**_without_absent_files(read), **_proxy_command(read)}
        options: asyncssh.SSHClientConnectionOptions = ssh.SSHClientConnectionOptions(**given, **changed)
    except (ssh.ConfigParseError, ValueError, OSError) as error:
        raise UserError(f"cannot read the SSH configuration for {host}: {error}; mend it") from error
    if options.known_hosts is None:
        raise UserError(
            f"the SSH configuration turns the check of {host}'s key off; "
            "remove 'UserKnownHostsFile none' there and put its key into ~/.ssh/known_hosts"
        )
    return options


def host_key_error(host: HostName, options: Any, error: Exception) -> UserError:
    """Return what is said of a host key that was not accepted."""
    if options.tunnel:
        return UserError(
            f"the host key of {host}, or of {options.tunnel} on the way there, is not known or has changed "
            f"({error}); connect once with ssh, which says which, and compare its fingerprint"
        )
    asyncssh = asyncssh_module()
    known = options.known_hosts or str(Path("~", ".ssh", "known_hosts").expanduser())
    called = options.host_key_alias or options.host or host.host
    port = options.port if options.port != 22 else None
    trusted: Any = ()
    with contextlib.suppress(OSError, ValueError):
        trusted = asyncssh.match_known_hosts(known, called, "", port)[0]
    name = f"[{called}]:{port}" if port and not options.host_key_alias else called
    if trusted:
        return UserError(
            f"the host key of {host} has changed: it is another machine, was set up anew, or somebody "
            f"listens; if you know why, run ssh-keygen -R '{name}' and connect once with ssh"
        )
    return UserError(
        f"the host key of {host} is not known ({error}); "
        f"compare its fingerprint and connect once with ssh, which adds {name} to known_hosts"
    )


def _proxy_command(read: Any) -> Mapping[str, Any]:
    """Return a ProxyCommand as ``ssh`` starts it: by a shell, for it may hold a pipe or ``2>/dev/null``.

    The shell stays: asyncssh takes a stderr that is closed for the end of the connection.
    """
    command = read.config.get("ProxyCommand")
    return {"proxy_command": ["/bin/sh", "-c", f"{command}\nexit"]} if command else {}


def _without_absent_files(read: Any) -> Mapping[str, Any]:
    """Return options in place of lists that name absent files: ``ssh`` passes over them, asyncssh fails.

    Of a key that an agent holds, only the public half may lie there.
    """
    changed: dict[str, Any] = {}
    keys: Sequence[str] = read.config.get("IdentityFile", ())
    there = [key for key in keys if _exists(key)]
    if len(there) < len(keys):
        public = [f"{key}.pub" for key in keys if key not in there and _exists(f"{key}.pub")]
        changed["client_keys"] = [*there, *(public if read.config.get("IdentitiesOnly") else ())]
        changed["ignore_encrypted"] = True
    certificates = read.config.get("CertificateFile", ())
    if not all(map(_exists, certificates)):
        changed["client_certs"] = [file for file in certificates if _exists(file)]
    known = read.known_hosts or ()
    there = [file for file in known if _exists(file)]
    if len(there) < len(known):
        changed["known_hosts"] = there or [os.devnull]
    return changed


def _exists(name: str) -> bool:
    return Path(name).expanduser().exists()
