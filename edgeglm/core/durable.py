"""What was written is on the disk, also after the power fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take_place(path: Path) -> None:
    """Take the place of a whole file on its disk, holes included.

    What is then written through a map meets no full disk, which is no error there but the end of the process.

    Raises:
        OSError: There is not so much place.
    """
    if not hasattr(os, "posix_fallocate"):  # as on macOS
        return
    handle = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(handle, 0, os.fstat(handle).st_size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # of a file system without it
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)
