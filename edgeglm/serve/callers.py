"""Who asks, on either face: the bearer token, and the id of a request."""

from __future__ import annotations

import hmac
import itertools
import os

from edgeglm.serve.refusals import UnauthorizedError

_LONGEST = 128  # bytes of an id


class Callers:
    """Checks tokens and names requests. One for a face.

    Args:
        token: What callers must send; None for nothing.
    """

    def __init__(self, token: str | None) -> None:
        self._token = f"Bearer {token}".encode() if token is not None else None
        self._numbers = itertools.count(1)
        self._prefix = os.urandom(4).hex().encode()

    def check(self, authorization: bytes) -> None:
        """Raise UnauthorizedError unless the header is right; compares in constant time."""
        if self._token is not None and not hmac.compare_digest(authorization, self._token):
            raise UnauthorizedError("the token is missing or wrong; send 'Authorization: Bearer TOKEN'")

    def id_for(self, given: bytes | None) -> bytes:
        """Take the caller's id if it may stand in a log and a header, or make one."""
        if given is not None and 0 < len(given) <= _LONGEST and all(33 <= byte <= 126 for byte in given):
            return given
        return b"%s-%d" % (self._prefix, next(self._numbers))
