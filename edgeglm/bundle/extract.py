"""Extract a bundle archive from an untrusted source, in constant memory.

The manifest comes first and bounds everything after it: a member that is not listed, comes twice,
or has another size than listed is refused before a byte of it is written, and what the manifest
lists in all is held against the size of the archive, the limits and the free disk. So a zip bomb
is refused before it expands, and no name reaches the file system unchecked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgeglm.bundle.archive import zstandard
from edgeglm.bundle.atomic import disk_errors
from edgeglm.bundle.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURES_NAME,
    Manifest,
    manifest_from_bytes,
)
from edgeglm.bundle.paths import check_name, inside
from edgeglm.bundle.signing import MAX_SIGNATURES_BYTES
from edgeglm.bundle.trust import SignatureState, Trust, check_age, check_signatures
from edgeglm.core.errors import UserError

_CHUNK_BYTES = 1 << 20
_MAX_ZSTD_WINDOW_BYTES = 1 << 27
_MAX_ZIP_DIRECTORY_BYTES = 32 << 20
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZIP_MAGIC = b"PK\x03\x04"
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_REMEDY = "the bundle is damaged or was altered, get it again"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an archive may grow to. ``ratio`` is expanded over packed bytes, above ``free_bytes``."""

    files: int = 100_000
    file_bytes: int = (8 << 30) - 1
    total_bytes: int = 32 << 30
    ratio: float = 200.0
    free_bytes: int = 64 << 20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class _Member:
    name: str
    size: int
    read: Callable[[int], bytes]


def is_archive(path: Path) -> bool:
    """Say whether the file begins as one of the archives we read. Raises UserError if unreadable."""
    try:
        with path.open("rb") as file:
            return file.read(4) in (_ZSTD_MAGIC, _ZIP_MAGIC)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a readable bundle") from error


def is_zip(path: Path) -> bool:
    """Say whether an archive is a .zip, by its content."""
    with path.open("rb") as file:
        return file.read(4) == _ZIP_MAGIC


def extract_archive(
    archive: Path, into: Path, *, trust: Trust, limits: Limits = DEFAULT_LIMITS
) -> tuple[Manifest, SignatureState]:
    """Extract ``archive`` into the empty folder ``into``; every file is verified as it is written.

    The signatures, which come second, are held against the raw manifest before it is parsed.

    Raises UserError for anything that is not exactly a bundle; ``into`` may then hold some verified
    files and part of one more, and the caller removes it.
    """
    with _damage_reported(archive), archive.open("rb") as file:
        members = _members(archive, file)
        manifest, state, raw = _signed_manifest(members, archive, trust)
        check_limits(manifest, archive, into, limits)
        pending = dict(manifest.files)
        for member in members:
            check_name(member.name, str(archive))
            record = pending.pop(member.name, None)
            if record is None:
                fault = "comes twice" if member.name in manifest.files else "is not in the manifest"
                raise UserError(f"{archive}: {member.name!r} {fault}; {_REMEDY}")
            if member.size != record.size:
                raise UserError(
                    f"{archive}: {member.name} has {member.size} bytes, "
                    f"the manifest says {record.size}; {_REMEDY}"
                )
            actual = _write_member(member, inside(into, member.name), archive)
            if actual != record.sha256:
                raise altered(str(archive), member.name, record.sha256, actual)
        if pending:
            raise UserError(f"{archive} ends before {min(pending)}: it was cut off; {_REMEDY}")
    with disk_errors(into):
        for name, data in raw.items():
            (into / name).write_bytes(data)
    return manifest, state


def archive_manifest(archive: Path) -> Manifest:
    """Read only the manifest of an archive, whoever made it. Raises UserError if there is none."""
    with _damage_reported(archive), archive.open("rb") as file:
        members = _members(archive, file)
        return manifest_from_bytes(_raw_manifest(members, archive), f"{archive}: {MANIFEST_NAME}")


def altered(origin: str, name: str, expected: str, actual: str) -> UserError:
    """Build the error for a file whose content is not the recorded one."""
    return UserError(f"{origin}: {name} has sha256 {actual}, the manifest says {expected}; {_REMEDY}")


def check_limits(manifest: Manifest, archive: Path, into: Path, limits: Limits) -> None:
    """Raise UserError if what the manifest promises is too much for the limits, ratio or disk."""
    largest = max((record.size for record in manifest.files.values()), default=0)
    packed = max(1, archive.stat().st_size)
    if (
        len(manifest.files) > limits.files
        or largest > limits.file_bytes
        or manifest.size > limits.total_bytes
    ):
        raise UserError(
            f"{archive} would expand to {len(manifest.files)} files of {manifest.size} bytes, the largest "
            f"{largest}; that is over the limits of a bundle; get it again from its maker"
        )
    if manifest.size > limits.free_bytes and manifest.size > limits.ratio * packed:
        raise UserError(
            f"{archive} would expand {manifest.size / packed:.0f} times, to {manifest.size} bytes, as zip "
            f"bombs do (limit {limits.ratio:.0f} times); get it again from its maker"
        )
    free = shutil.disk_usage(into).free
    if manifest.size > free:
        raise UserError(f"{archive} needs {manifest.size} bytes, {into} has {free} free; free some space")


def _raw_manifest(members: _Members, archive: Path) -> bytes:
    first = next(members, None)
    if first is None or first.name != MANIFEST_NAME:
        raise UserError(f"{archive} does not begin with {MANIFEST_NAME}; pack it with edgeglm")
    if first.size > MAX_MANIFEST_BYTES:
        raise UserError(f"{archive}: {MANIFEST_NAME} has {first.size} bytes; {_REMEDY}")
    return b"".join(_chunks(first, archive))


def _signed_manifest(
    members: _Members, archive: Path, trust: Trust
) -> tuple[Manifest, SignatureState, dict[str, bytes]]:
    """Return the manifest, what its signatures are worth, and the raw bytes of both files."""
    raw = {MANIFEST_NAME: _raw_manifest(members, archive)}
    if members.peek_name() == SIGNATURES_NAME:
        member = next(members)
        if member.size > MAX_SIGNATURES_BYTES:
            raise UserError(f"{archive}: {SIGNATURES_NAME} has {member.size} bytes; {_REMEDY}")
        raw[SIGNATURES_NAME] = b"".join(_chunks(member, archive))
    origin = str(archive)
    state = check_signatures(trust, raw[MANIFEST_NAME], raw.get(SIGNATURES_NAME), origin)
    manifest = manifest_from_bytes(raw[MANIFEST_NAME], f"{archive}: {MANIFEST_NAME}")
    check_age(trust, manifest, origin)
    return manifest, state, raw


class _Members(Iterator[_Member]):
    """Members one by one, with a look at the next one's name."""

    def __init__(self, members: Iterator[_Member]) -> None:
        self._members = members
        self._waiting: list[_Member] = []

    def __next__(self) -> _Member:
        return self._waiting.pop() if self._waiting else next(self._members)

    def peek_name(self) -> str | None:
        """Return the name of the next member; its content is still unread."""
        if not self._waiting:
            found = next(self._members, None)
            if found is None:
                return None
            self._waiting.append(found)
        return self._waiting[0].name


def _members(archive: Path, file: IO[bytes]) -> _Members:
    zipped = file.read(4) == _ZIP_MAGIC
    return _Members(_zip_members(archive, file) if zipped else _tar_members(archive, file))


def _chunks(member: _Member, archive: Path) -> Iterator[bytes]:
    left = member.size
    while left:
        chunk = member.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise UserError(f"{archive} ends inside {member.name}: it was cut off; {_REMEDY}")
        left -= len(chunk)
        yield chunk


def _write_member(member: _Member, path: Path, archive: Path) -> str:
    digest = hashlib.sha256()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(handle, "wb", buffering=0) as out:
        for chunk in _chunks(member, archive):
            digest.update(chunk)
            with disk_errors(path):
                view = memoryview(chunk)
                while view:
                    view = view[out.write(view) or 0 :]
    return digest.hexdigest()


def _tar_members(archive: Path, file: IO[bytes]) -> Iterator[_Member]:
    """Read plain ustar headers one by one; extended headers, links and devices are refused."""
    file.seek(0)
    decompressor = zstandard().ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
    with decompressor.stream_reader(file, closefd=False) as stream:
        while True:
            block = _exactly(stream.read, tarfile.BLOCKSIZE, archive)
            if not any(block):
                return
            entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.size < 0:
                raise UserError(f"{archive}: {entry.name!r} is not a plain file; pack it with edgeglm")
            yield _Member(name=entry.name, size=entry.size, read=stream.read)
            _exactly(stream.read, -entry.size % tarfile.BLOCKSIZE, archive)


def _exactly(read: Callable[[int], bytes], size: int, archive: Path) -> bytes:
    data = b""
    while len(data) < size:
        chunk = read(size - len(data))
        if not chunk:
            raise UserError(f"{archive} ends early: it was cut off; {_REMEDY}")
        data += chunk
    return data


def _zip_members(archive: Path, file: IO[bytes]) -> Iterator[_Member]:
    _check_zip_directory(archive, file)
    with zipfile.ZipFile(file) as opened:
        entries = opened.infolist()
        for entry in entries:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            plain = kind in (0, stat.S_IFREG) and entry.compress_type in _ZIP_METHODS
            if not plain or entry.flag_bits & 1 or entry.filename != entry.orig_filename:
                raise UserError(
                    f"{archive}: {entry.orig_filename!r} is not a plain file; pack it with edgeglm"
                )
        first = {MANIFEST_NAME: 0, SIGNATURES_NAME: 1}
        for entry in sorted(entries, key=lambda entry: first.get(entry.filename, 2)):
            with opened.open(entry) as stream:
                yield _Member(name=entry.filename, size=entry.file_size, read=stream.read)


def _check_zip_directory(archive: Path, file: IO[bytes]) -> None:
    """Refuse a huge central directory, which ``zipfile`` would read into memory whole."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 16) - 22 - 76))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    declared = struct.unpack_from("<I", tail, end + 12)[0] if 0 <= end <= len(tail) - 22 else 0
    if declared == 0xFFFFFFFF:
        wide = tail.rfind(b"PK\x06\x06")
        declared = struct.unpack_from("<Q", tail, wide + 40)[0] if 0 <= wide <= len(tail) - 56 else declared
    if declared > _MAX_ZIP_DIRECTORY_BYTES:
        raise UserError(f"{archive}: its table of contents has {declared} bytes; {_REMEDY}")
    file.seek(0)


@contextmanager
def _damage_reported(archive: Path) -> Iterator[None]:
    """Turn what the decoders raise on damaged input into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
        raise UserError(f"cannot read {archive}: {error}; {_REMEDY}") from error
    except (zipfile.BadZipFile, zlib.error, struct.error, tarfile.TarError) as error:
        raise UserError(f"cannot read {archive}: {error}; {_REMEDY}") from error
    except Exception as error:  # zstandard raises its own class, which is imported lazily
        if type(error).__module__.partition(".")[0] != "zstandard":
            raise
        raise UserError(f"cannot read {archive}: {error}; {_REMEDY}") from error
