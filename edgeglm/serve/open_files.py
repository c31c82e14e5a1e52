"""How many connections the system lets this process hold: each takes a file descriptor."""

from __future__ import annotations

import resource
from contextlib import suppress

from edgeglm.core.errors import UserError

SPARE = 64
"""Descriptors for all else: the bundle, the log, gRPC, an index, callers who are told to come later."""


def connections_allowed(wanted: int) -> int:
    """Raise the soft limit of open files as far as is needed and allowed; return how many connections fit.

    As many again are made room for, since gRPC counts none of its own. Raises UserError where none fits.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + SPARE
    if soft == resource.RLIM_INFINITY:
        return wanted
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if raised > soft:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft <= SPARE:
        raise UserError(f"this process may open {soft} files; allow more than {SPARE} with 'ulimit -n'")
    return min(wanted, soft - SPARE)
