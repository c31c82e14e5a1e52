"""The folder of an extracted archive: locked by the process that uses it, gone once nobody does.

One that is left open goes as its process ends; one of a process that was killed goes when the next is made.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from edgeglm.bundle.atomic import disk_errors, sweep

_PREFIX = "edgeglm-bundle-"
_ours: dict[Path, tuple[int, int]] = {}  # the process that made a folder, and the handle that locks it


def temporary_folder() -> Path:
    """Make a folder in the place for temporary files. Raises UserError where none can be made."""
    parent = Path(tempfile.gettempdir())
    with disk_errors(parent):
        for left in parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                if left.lstat().st_uid == os.geteuid():
                    sweep(left)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            handle = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems lock no folders, and sweep none
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.is_dir():
                break
            os.close(handle)  # somebody swept it before it was locked
    _ours[folder] = os.getpid(), handle
    return folder


def remove_temporary(folder: Path) -> None:
    """Remove a folder that ``temporary_folder`` made. Does nothing a second time, or in a forked child."""
    maker, handle = _ours.pop(folder, (None, None))
    if handle is None:
        return
    if maker == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)


@atexit.register
def _remove_all() -> None:
    for folder in tuple(_ours):
        remove_temporary(folder)
