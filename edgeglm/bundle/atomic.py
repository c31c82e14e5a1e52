"""Put a finished folder or file where a reader looks, in one step.

The new one is written to a hidden sibling. A folder that is already there is exchanged with it by
``renameat2(RENAME_EXCHANGE)`` (Linux; see renameat2(2)), so that ``kill -9`` at any instant leaves
the old one or the new one, whole. Where the file system cannot exchange, the old one steps aside
first; should the process die between the two renames, the next writer puts it back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeglm.core.durable import sync_path
from edgeglm.core.errors import UserError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def require_ours(out: Path, marker: str, names: Collection[str], *, inputs: Collection[Path] = ()) -> None:
    """Raise UserError if ``put_in_place`` would remove from ``out`` what is not ours; asked before any work.

    ``out`` may be absent, an empty folder, or one that holds ``marker`` and nothing but files called
    ``names``. None of ``inputs`` may lie in it.
    """
    whole = out.resolve()
    for given in inputs:
        if given.resolve().is_relative_to(whole):
            raise UserError(f"{given} lies in {out}, which is replaced as a whole; choose another --output")
    remedy = "choose another --output, or remove that yourself"
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is there and is no folder; {remedy}")
    try:
        held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    except OSError as error:
        raise UserError(f"cannot look into {out}: {error.strerror}; {remedy}") from error
    if held and (marker not in held or held - {marker, *names}):
        strange = sorted(held - {marker, *names}) or sorted(held)
        raise UserError(f"{out} holds {strange[0]!r}, which edgeglm did not write there; {remedy}")


@contextmanager
def disk_errors(destination: Path) -> Iterator[None]:
    """Turn every OSError of a write into a UserError with a remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space or choose another disk" if full else "choose a folder that can be written"
        raise UserError(
            f"cannot write {destination}: {error.strerror or error}; nothing was changed there, {remedy}"
        ) from error


@contextmanager
def scratch_folder(prefix: str) -> Iterator[str]:
    """Yield a folder in the place for temporary files. Raises UserError where none can be made."""
    with disk_errors(Path(tempfile.gettempdir())):
        folder = tempfile.TemporaryDirectory(prefix=prefix)
    with folder as path:
        yield path


@contextmanager
def staging_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``destination``, removed afterwards if it is still there.

    It is locked by its process; those that a killed process left behind are swept first.
    """
    parent = destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.writing-"
    with _folder_lock(parent):  # nobody sweeps between making the folder and locking it
        for left in parent.iterdir():
            if left.name.startswith(prefix):
                sweep(left)
        aside = _aside(destination)
        if aside.exists() and not destination.exists():
            aside.rename(destination)
        folder = parent / f"{prefix}{uuid.uuid4().hex}"
        folder.mkdir()
        owner = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield folder
    finally:
        os.close(owner)
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(new: Path, destination: Path) -> None:
    """Rename ``new`` to ``destination``; what was there, file or folder, is then at ``new``'s old path.

    Both must be on one file system. The caller removes what was replaced.
    """
    with _folder_lock(destination.parent):  # of two writers, the second replaces what the first put there
        if destination.is_dir() and not destination.is_symlink():
            if not _exchange(new, destination):
                aside = _aside(destination)
                shutil.rmtree(aside, ignore_errors=True)
                destination.rename(aside)
                try:
                    new.rename(destination)
                except OSError:
                    aside.rename(destination)
                    raise
                aside.rename(new)
        else:
            new.replace(destination)
        sync_path(destination.parent)


def _aside(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux, or a C library older than 2.28
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sweep(left: Path) -> None:
    """Remove a folder, unless a process that is alive has locked it."""
    try:
        handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its process is alive
        return
    else:
        shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(handle)
