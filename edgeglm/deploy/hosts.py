"""A device as a person names it: ``host``, ``user@host`` or ``user@host:port``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeglm.core.errors import UserError

_NAME = re.compile(
    r"(?:(?P<user>[A-Za-z0-9._-]+)@)?(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d+))?"
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
