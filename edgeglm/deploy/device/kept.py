"""This side's own source, kept below the root: the next sender of the same version need not send it.

Who starts it (``_LOADER`` in agent_source.py) runs the very bytes whose sha256 it has held against the one
that the sender named, and reads them only from a folder and a file that are this user's and no other may
write.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from edgeglm.deploy.device.objects import remove_tree

FOLDER = "agent"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


def keep_source(root: Path, source: bytes) -> None:
    """Keep it in place of whatever lies there. A root with no room for it costs the next sender the bytes."""
    folder = root / FOLDER
    with suppress(OSError):
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        remove_tree(folder)
        folder.mkdir(mode=0o700)
        # Cut off in the middle it has another digest, and is no more run than what a stranger wrote.
        with os.fdopen(os.open(folder / hashlib.sha256(source).hexdigest(), _NEW, 0o600), "wb") as file:
            file.write(source)
