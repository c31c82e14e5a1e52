"""Where things lie on a device, and how they change: by one rename each.

<root>/objects/<sha256>         every file that ever came, once, read-only
<root>/incoming/<sha256>        what came of a file so far
<root>/slots/a, b, c            one bundle each: bundle/ (links to objects), bundle.finalized/,
environment (a link), slot.json. The third is for what comes: what serves and what did before stay as they are
<root>/environments/<digest>    a Python environment, shared by the slots that need it
<root>/current, previous        links to slots; a switch is the rename of one link
<root>/switching.json           a switch that was begun and not yet judged
<root>/device.json              how the current slot is served
<root>/run/                     the plain supervisor's state and log
<root>/lock                     one deployer at a time
<root>/agent/<sha256>           what the last sender started here, for the next one to start
<root>/edgeglm-root             says that all this is edgeglm's: only such a folder is ever written or removed
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeglm.deploy.device.wire import Refused

SLOTS = ("a", "b", "c")
MARKER = "edgeglm-root"
_FOLDERS = ("objects", "incoming", "slots", "environments", "run")
_FILES = (MARKER, "lock", "current", "previous", "switching.json", "device.json", "trust", ".writable")
_UNFINISHED = (".current.new", ".previous.new", ".switching.json.new", ".device.json.new")
_OURS = frozenset((*_FOLDERS, *_FILES, *_UNFINISHED, "agent"))
_NOBODYS = frozenset(("lost+found", ".writable"))  # of a new file system, of a first try


class Layout:
    """The files of one device below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"
        self.incoming = root / "incoming"
        self.slots = root / "slots"
        self.environments = root / "environments"
        self.run = root / "run"

    def make(self) -> None:
        """Make the folders. Raises Refused where others' files lie, OSError where nothing can be written."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.is_ours():
            if foreign := self._names() - _NOBODYS:
                raise Refused(
                    f"{self.root} on the device holds what is not edgeglm's ({sorted(foreign)[0]}); "
                    "pass a new or an empty folder as --root"
                )
            (self.root / MARKER).write_text("Made by edgeglm deploy; 'edgeglm remove' takes it away.\n")
        for name in _FOLDERS:
            (self.root / name).mkdir(exist_ok=True)
        probe = self.root / ".writable"
        probe.write_bytes(b"x")
        probe.unlink()

    def is_ours(self) -> bool:
        """Say whether edgeglm made this root: it is marked, or is just what was made before roots were."""
        if (self.root / MARKER).is_file():
            return True
        names = self._names()
        return names.issuperset(_FOLDERS) and all(_is_ours(name) for name in names)

    def remove(self) -> tuple[int, list[str]]:
        """Remove what edgeglm made; return the bytes freed, and the names of what else lies there."""
        last = ("lock", MARKER)  # what keeps others out, and what says whose all this is
        mine = sorted(filter(_is_ours, self._names()), key=lambda name: (name in last, name == MARKER))
        size = bytes_in(self.root / name for name in mine)
        for record in self.environments.glob("*/complete.json"):
            record.unlink()
        for path in (self.root / name for name in mine):
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path)
        left = sorted(self._names())
        if not left:
            with suppress(OSError):  # a link, where a disk is mounted, or in a folder that is another user's
                self.root.rmdir()
        return size, left

    def _names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()

    def pointed(self, link: str) -> str | None:
        """Return the slot that ``current`` or ``previous`` points to; None where it points nowhere."""
        try:
            name = (self.root / link).readlink().name
        except OSError:
            return None
        return name if (self.slots / name).is_dir() else None

    def point(self, link: str, slot: str | None) -> None:
        """Point a link to a slot, or nowhere, in one rename."""
        place = self.root / link
        if slot is None:
            place.unlink(missing_ok=True)
        else:
            new = self.root / f".{link}.new"
            new.unlink(missing_ok=True)
            new.symlink_to(Path("slots") / slot)
            new.replace(place)
        sync_folder(self.root)

    def spare(self) -> str:
        """Return the slot that neither serves nor is what a rollback goes back to."""
        return next(slot for slot in SLOTS if slot not in (self.pointed("current"), self.pointed("previous")))

    def record(self, slot: str) -> dict[str, Any]:
        """Return what ``slot.json`` says; nothing for an empty slot."""
        return read_json(self.slots / slot / "slot.json")

    def write_record(self, slot: str, **changed: Any) -> dict[str, Any]:
        """Change some fields of ``slot.json`` in one step and return all of them."""
        record = {**self.record(slot), **changed}
        write_json(self.slots / slot / "slot.json", record)
        return record


def bytes_in(folders: Iterable[Path]) -> int:
    """Return the bytes of all files below folders; one that is linked to several times counts once."""
    found: dict[tuple[int, int], int] = {}
    left = [str(folder) for folder in folders if folder.is_dir() and not folder.is_symlink()]
    while left:  # an environment has 16,000 files: pathlib takes half a minute for them
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    of = entry.stat(follow_symlinks=False)
                    found[of.st_dev, of.st_ino] = of.st_size
    return sum(found.values())


def _is_ours(name: str) -> bool:
    return name in _OURS or name.startswith(".wheels-")


class Lock:
    """One deployer at a time. The lock ends with the process that holds it, however that ends."""

    def __init__(self, root: Path) -> None:
        self._path = root / "lock"
        self._handle: int | None = None

    def take(self, owner: str, seconds: float, gone: Callable[[], bool]) -> None:
        """Take the lock, waiting a while. Raises Refused with owner and age of the one that holds it."""
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() >= end or gone():
                    raise Refused(self._held()) from None
                time.sleep(0.05)
                continue
            break
        os.ftruncate(self._handle, 0)
        words = {"owner": owner, "pid": os.getpid(), "since": time.time()}
        os.pwrite(self._handle, json.dumps(words).encode(), 0)

    def is_there(self) -> bool:
        """Say whether the file that was locked still lies in the root."""
        assert self._handle is not None
        try:
            return os.path.samestat(os.fstat(self._handle), self._path.stat())
        except FileNotFoundError:
            return False

    def _held(self) -> str:
        assert self._handle is not None
        import datetime  # this and the like cost a small board time at every start

        try:
            found = json.loads(os.pread(self._handle, 4096, 0))
            age = datetime.timedelta(seconds=max(0, int(time.time() - float(found["since"]))))
            owner = f"{found['owner']} (process {int(found['pid'])} there), since {age} h"
        except (ValueError, KeyError, TypeError):
            owner = "somebody"
        return f"this device is being deployed to by {owner}; wait until that has ended, or end it"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; nothing where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one step, durably."""
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)


def sync_all(folder: Path) -> None:
    """Make everything durable on the file system of a folder: once, and not file by file (syncfs(2))."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None).syncfs(handle) != 0:
            os.sync()
    except AttributeError:
        os.sync()
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
