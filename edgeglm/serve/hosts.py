"""By which names a server may be called: a page of a site whose name was pointed here is refused."""

from __future__ import annotations

import ipaddress

from edgeglm.serve.config import ServeConfig

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Hosts:
    """The names of one server.

    On loopback these are loopback's and those of the settings. Beyond it a token keeps strangers out, and
    then any name will do unless some were given; without one, addresses will do too, since no page can have
    one of ours as its site's name.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._any = not config.loopback and config.token is not None and not config.hosts
        self._addresses = not config.loopback and config.token is None
        names = {*_LOOPBACK, config.host, *config.hosts}
        self._names = frozenset(name.lower().encode() for name in names)

    def know(self, host: bytes) -> bool:
        """Say whether a ``Host`` header, with its port or without, is the server's."""
        if self._any or host in self._names:
            return True
        name = _without_port(host.lower())
        return name in self._names or (self._addresses and _is_address(name))


def _without_port(host: bytes) -> bytes:
    if host.startswith(b"["):
        return host[1:].partition(b"]")[0]
    return host.partition(b":")[0]


def _is_address(name: bytes) -> bool:
    try:
        ipaddress.ip_address(name.decode("ascii"))
    except ValueError:  # of which half a character is a kind
        return False
    return True
