"""One finalize at a time: a lock that says who holds it and that a killed process gives up."""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edgeglm.bundle.atomic import disk_errors
from edgeglm.core.errors import UserError

_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)


class _Owner(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    started: str


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold the lock of a finalized folder; a second one is refused with the first one's number.

    Yields its handle: a child that inherits it holds the lock too, as long as it lives.
    """
    path = folder / ".lock"
    with disk_errors(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            raise UserError(
                f"cannot write {folder}: {error.strerror}; link the bundle into a folder of yours (ln -s), "
                "make the link's own .finalized folder beside it (mkdir), and finalize the link"
            ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder.name}: another finalize is at work{_owner(handle)}; wait until it has ended"
            ) from error
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        with disk_errors(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, msgspec.json.encode(_Owner(pid=os.getpid(), started=started)), 0)
        yield handle
    finally:
        os.close(handle)


def _owner(handle: int) -> str:
    try:
        owner = msgspec.json.decode(os.pread(handle, 4096, 0), type=_Owner)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
    return f" (process {owner.pid}, since {owner.started})"
