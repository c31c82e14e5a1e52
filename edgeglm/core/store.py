"""The content-addressed cache of artifacts.

An entry is written to a temporary sibling, synced, and renamed into place, so a reader sees
either nothing or all of it, and ``kill -9`` at any instant loses only the unfinished entry.
An entry that no longer matches its digests is dropped and counts as a miss.

    <root>/entries/<key>/entry.json     what the entry is, with the sha256 of each file
    <root>/entries/<key>/files/...      the files, read-only
    <root>/used/<key>                   touched at every hit; orders the garbage collection. Who was given an
                                        entry holds a shared lock on it, and no collection removes it then
    <root>/locks/<key>                  one writer a key
    <root>/scratch/                     unfinished work; swept when no process owns it
    <root>/checkpoints/<key>/           states of trainings that were cut off; they go after a week
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeglm.core.artifact import Artifact, listing_of
from edgeglm.core.durable import sync_path
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.holds import Holds

ENTRY_SCHEMA = 1
DEFAULT_QUOTA_BYTES = 20 << 30
SENT_HOME = "device-build"
"""The kind of what a device sent home: no rerun here makes it again, so no quota drops it."""
CHECKPOINT_SECONDS = 7 * 24 * 3600
#: A disk with less than this free is full: what failed in that moment failed for it.
_FULL_BYTES = 1 << 20


def default_store_root() -> Path:
    """Return ``$EDGEGLM_STORE``, else the user's cache folder."""
    if configured := os.environ.get("EDGEGLM_STORE"):
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgeglm"


@dataclass(frozen=True, kw_only=True)
class StoreEntry:
    """One line of ``edgeglm cache list``."""

    key: str
    kind: str
    size_bytes: int
    last_used: float


class Store:
    """A directory of artifacts by key. Safe for several processes at once.

    What it gave stays while it lives, or until it collects itself: other stores' collections leave it.
    """

    def __init__(self, root: Path, *, quota_bytes: int = DEFAULT_QUOTA_BYTES) -> None:
        self.root = root
        self.quota_bytes = quota_bytes
        try:
            for name in ("entries", "used", "locks", "scratch"):
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot use the store at {root}: {error.strerror}; "
                "set EDGEGLM_STORE to a folder that can be written"
            ) from error
        self._holds = Holds(root / "used")

    def get(self, key: str) -> Artifact | None:
        """Return the verified artifact stored under ``key``, or None. Every byte is hashed.

        Raises UserError for an entry that cannot be read just now, which says nothing of what it holds.
        """
        folder = self.root / "entries" / key
        try:
            record = json.loads((folder / "entry.json").read_bytes())
            recorded = record["files"]
            intact = record["schema"] == ENTRY_SCHEMA and listing_of(folder / "files") == recorded
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError):
            intact, record = False, {}
        except OSError as error:
            raise UserError(
                f"cannot read the store's entry {folder}: {error.strerror}; "
                "try again, or remove that folder to have its content made anew"
            ) from error
        if not intact:
            if folder.exists():
                self._drop(folder)
            return None
        with suppress(OSError):
            (self.root / "used" / key).touch()
            self._holds.take(key)
        if not folder.exists():  # collected before it was held
            return None
        return Artifact(
            kind=record["kind"],
            path=folder / "files",
            files=record["files"],
            provenance=record["provenance"],
        )

    def put(self, key: str, kind: str, write: Callable[[Path], Mapping[str, Any]]) -> tuple[Artifact, bool]:
        """Return the artifact under ``key``, made by ``write`` if it is not there.

        ``write(folder)`` fills an empty folder and returns the provenance to record. The second
        value says whether the artifact was already stored. Raises UserError when the disk is full.
        """
        with self._locked(key):
            if (found := self.get(key)) is not None:
                return found, True
            with self.scratch() as scratch, self._disk_errors():
                files = scratch / "entry" / "files"
                files.mkdir(parents=True)
                provenance = dict(write(files))
                return self._commit(key, kind, scratch / "entry", provenance), False

    def drop(self, key: str) -> None:
        """Remove the entry under ``key``, if there is one."""
        with self._locked(key):
            self._drop(self.root / "entries" / key)
            (self.root / "used" / key).unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder on the store's own file system, removed afterwards.

        A lock file beside it says that its process lives; what a killed process left is swept.
        """
        self._sweep_scratch()
        folder = self.root / "scratch" / uuid.uuid4().hex
        with folder.with_suffix(".lock").open("w") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            folder.mkdir()
            try:
                yield folder
            finally:
                _remove_tree(folder)
                folder.with_suffix(".lock").unlink(missing_ok=True)

    def entries(self) -> list[StoreEntry]:
        """List what is stored, the longest unused first."""
        found = []
        for folder in (self.root / "entries").iterdir():
            try:
                kind = json.loads((folder / "entry.json").read_bytes())["kind"]
            except (OSError, ValueError, KeyError):
                kind = "corrupt"
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            used = self.root / "used" / folder.name
            last = used.stat().st_mtime if used.exists() else 0.0
            found.append(StoreEntry(key=folder.name, kind=kind, size_bytes=size, last_used=last))
        return sorted(found, key=lambda entry: (entry.last_used, entry.key))

    def collect(self, *, quota_bytes: int | None = None) -> list[StoreEntry]:
        """Remove the longest unused entries until the rest fits the quota; return what went.

        What another store was given, in this process or another, stays; what this one was given may go.
        Checkpoints that no training touched for a week go as well; with a quota of 0 all of them, unless
        something is being written: it may be what they belong to.
        """
        quota = self.quota_bytes if quota_bytes is None else quota_bytes
        entries = self.entries()
        total = sum(entry.size_bytes for entry in entries)
        removed = []
        self._holds.release()
        for entry in entries:
            if total <= quota:
                break
            if entry.kind == SENT_HOME or not self._dropped_unused(entry.key):
                continue
            total -= entry.size_bytes
            removed.append(entry)
        self._sweep_scratch()
        self._sweep_checkpoints(0 if quota == 0 and not self._writing() else CHECKPOINT_SECONDS)
        return removed

    def _dropped_unused(self, key: str) -> bool:
        with self._locked(key, wait=False) as unwritten, self._holds.alone(key) as unused:
            if not (unwritten and unused):
                return False
            self._drop(self.root / "entries" / key)
            (self.root / "used" / key).unlink(missing_ok=True)
            return True

    def _writing(self) -> bool:
        for path in (self.root / "locks").iterdir():
            with suppress(OSError), path.open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
        return False

    @property
    def checkpoints(self) -> Path:
        """The folder of the states that trainings keep until they are done."""
        return self.root / "checkpoints"

    def _sweep_checkpoints(self, seconds: int) -> None:
        for folder in self.checkpoints.glob("*"):
            touched = max((path.stat().st_mtime for path in (folder, *folder.glob("*"))), default=0.0)
            if time.time() - touched >= seconds:
                _remove_tree(folder)

    def _commit(self, key: str, kind: str, staged: Path, provenance: dict[str, Any]) -> Artifact:
        listing = listing_of(staged / "files")
        record = {"schema": ENTRY_SCHEMA, "kind": kind, "files": listing, "provenance": provenance}
        (staged / "entry.json").write_text(json.dumps(record, indent=1, sort_keys=True))
        for folder, _, names in os.walk(staged):
            for name in names:
                path = Path(folder) / name
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        target = self.root / "entries" / key
        staged.rename(target)
        sync_path(target.parent)
        (self.root / "used" / key).touch()
        with suppress(OSError):
            self._holds.take(key)
        return Artifact(kind=kind, path=target / "files", files=listing, provenance=provenance)

    @contextmanager
    def _locked(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Be the one writer of a key; False where another is, and nobody waits."""
        with (self.root / "locks" / key).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Tell a full disk as one, also where a library has another error for it, or one without a number."""
        try:
            yield
        except (EdgeglmError, MemoryError):
            raise
        except Exception as error:
            told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            if not told and shutil.disk_usage(self.root).free >= _FULL_BYTES:
                raise
            reason = error.strerror if isinstance(error, OSError) and told else "no space is left there"
            raise UserError(
                f"cannot write to the store at {self.root}: {reason}; "
                "free some space (edgeglm cache gc) or set EDGEGLM_STORE to another disk"
            ) from error

    def _drop(self, folder: Path) -> None:
        """Rename away first, so that no reader meets a half-removed entry."""
        with self.scratch() as grave, suppress(FileNotFoundError):
            folder.rename(grave / "dropped")

    def _sweep_scratch(self) -> None:
        for lock in (self.root / "scratch").glob("*.lock"):
            try:
                with lock.open("r+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its process is alive, or has just removed it
                continue
            _remove_tree(lock.with_suffix(""))
            lock.unlink(missing_ok=True)


def _remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
