"""How many bytes of requests a server holds at a time, over both faces."""

from __future__ import annotations

from edgeglm.runtime.requests import OverloadedError


class Budget:
    """Bytes that are held, and the most that may be; counts refusals. Used in the event loop alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.refused = 0

    def reserve(self, size: int) -> None:
        """Book bytes. Raises OverloadedError if all requests together would have too many."""
        if self.held + size > self.limit:
            self.refused += 1
            raise OverloadedError("the server holds as many bytes of requests as it may; try later")
        self.held += size

    def release(self, size: int) -> None:
        """Give booked bytes back."""
        self.held -= size
