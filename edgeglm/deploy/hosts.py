"""Devices as a person names them (``host``, ``user@host``, ``user@host:port``), and who asks for them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from edgeglm.core.errors import UserError

T = TypeVar("T")
_NAME = re.compile(
    r"(?:(?P<user>[A-Za-z0-9._-]+)@)?(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\])(?::(?P<port>\d+))?"
)


@dataclass(frozen=True, kw_only=True)
class HostName:
    """A parsed name. What is absent is what the user's SSH configuration says."""

    text: str
    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        return self.text


def host_from_text(text: str) -> HostName:
    """Parse ``[user@]host[:port]``; an IPv6 address stands in brackets. Raises UserError."""
    found = _NAME.fullmatch(text)
    if found is None or found["host"].startswith("-") or not 0 < int(found["port"] or 1) < 65536:
        raise UserError(f"{text!r} is no device; write it as user@host, host or user@host:port")
    port = int(found["port"]) if found["port"] else None
    return HostName(text=text, host=found["host"].strip("[]"), user=found["user"], port=port)


def hosts_from_texts(texts: Sequence[str]) -> tuple[HostName, ...]:
    """Parse the devices of a command line. Raises UserError for none, a malformed one, or one twice."""
    hosts = tuple(map(host_from_text, texts))
    if not hosts:
        raise UserError("no device was named; give at least one user@host")
    doubles = sorted({host.text for host in hosts if [h.text for h in hosts].count(host.text) > 1})
    if doubles:
        raise UserError(f"{', '.join(doubles)} is named twice; name each device once")
    return hosts


async def bounded(items: Sequence[T], work: Callable[[T], Awaitable[Any]], parallel: int) -> None:
    """Run ``work`` on all items, at most ``parallel`` at a time."""
    places = asyncio.Semaphore(max(1, parallel))

    async def placed(item: T) -> None:
        async with places:
            await work(item)

    await asyncio.gather(*map(placed, items))


def owner_here() -> str:
    """Return who deploys, for the lock of a device."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "somebody"
    return f"{user}@{socket.gethostname()}"
