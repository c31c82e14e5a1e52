"""Sockets bound before anything is loaded, so that a port in use is told at once."""

from __future__ import annotations

import errno
import os
import socket

from edgeglm.core.errors import UserError

_BACKLOG = 2048


def listening(host: str, port: int, *, what: str, option: str) -> socket.socket:
    """Bind and listen. Raises UserError for a port in use or not allowed, or an address that is not here."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}: {error}; give --host an address of this machine") from None
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else asyncio leaves Nagle on
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise UserError(
            f"cannot listen on {host}:{port} for {what}: {why_not(error)}; give {option} another port"
        ) from None
    return bound


def why_not(error: OSError) -> str:
    """Say in plain words why a port cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return "another program listens there"
    if error.errno == errno.EACCES:
        return "ports below 1024 are for root"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    return os.strerror(error.errno) if error.errno else str(error)


def address_of(bound: socket.socket) -> str:
    """Return ``host:port``, with brackets around IPv6."""
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
