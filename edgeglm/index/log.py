"""The write-ahead log of an index: records that are whole or not there.

    record = magic "EGLR" | kind u8 | head bytes u32 | blob bytes u64 | crc32 of head and blob u32
             | crc32 of the 21 bytes before u32 | head | blob

A record is acknowledged once it is synced, and only then is the next one begun. So a process that is killed,
or a machine that loses power, leaves at most one unfinished record, at the end. ``replayed`` passes that one
over; a broken record that valid ones follow is no unfinished one but damage, and is refused.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeglm.core.errors import UserError

_MAGIC = b"EGLR"
_HEADER = struct.Struct("<4sBIQI")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECK.size


@dataclass(frozen=True, kw_only=True)
class LogRecord:
    """One record. ``blob_at`` is where its blob begins in the file, ``end`` where the next record does."""

    kind: int
    head: bytes
    blob: bytes
    blob_at: int
    end: int


def record_bytes(kind: int, head: bytes, blob: bytes = b"") -> bytes:
    """Return one record as it is written."""
    crc = zlib.crc32(blob, zlib.crc32(head))
    header = _HEADER.pack(_MAGIC, kind, len(head), len(blob), crc)
    return header + _CHECK.pack(zlib.crc32(header)) + head + blob


def records_from(data: bytes, start: int = 0) -> Iterator[LogRecord]:
    """Yield the whole records of ``data``, which begins at byte ``start`` of its file, up to a broken one."""
    at = 0
    while (record := _record_at(data, at, start)) is not None:
        yield record
        at = record.end - start


def replayed(file: int, path: Path, start: int = 0) -> tuple[list[LogRecord], int]:
    """Read the records from byte ``start`` on.

    Args:
        file: A descriptor of the log.
        path: Its name, for messages; the log may have been removed since it was opened.
        start: Where a record begins.

    Returns:
        The records, and where the last one ends: what lies behind is an unfinished record.

    Raises:
        UserError: A record in the middle is damaged.
    """
    data = _read_from(file, start)
    records = list(records_from(data, start))
    end = records[-1].end if records else start
    rest = data[end - start :]
    at = rest.find(_MAGIC, 1)
    while at >= 0:
        if _record_at(rest, at, 0) is not None:
            raise UserError(
                f"{path} is damaged at byte {end}: whole records follow a broken one; "
                "restore the index from a copy, or build it again"
            )
        at = rest.find(_MAGIC, at + 1)
    return records, end


class AppendLog:
    """The log, open for its one writer. Use it as a context manager of the writer's, who holds the lock."""

    def __init__(self, path: Path, end: int) -> None:
        self.path = path
        self.end = end
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if os.fstat(self._file).st_size > end:  # an unfinished record of a writer that was killed
            os.ftruncate(self._file, end)
            os.fsync(self._file)

    def append(self, kind: int, head: bytes, blob: bytes = b"") -> int:
        """Write one record and sync it; return where its blob begins. When it returns, it is kept.

        Raises UserError when the disk is full; nothing of the record is then left.
        """
        data = memoryview(record_bytes(kind, head, blob))
        begin = self.end
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], begin + written)
            os.fdatasync(self._file)
        except OSError as error:
            os.ftruncate(self._file, begin)
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; nothing of this was kept, free some space"
            ) from error
        self.end = begin + len(data)
        return begin + HEADER_BYTES + len(head)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _read_from(file: int, start: int) -> bytes:
    parts, at = [], start
    while part := os.pread(file, 1 << 24, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _record_at(data: bytes, at: int, start: int) -> LogRecord | None:
    if at + HEADER_BYTES > len(data):
        return None
    header = data[at : at + _HEADER.size]
    magic, kind, head_bytes, blob_bytes, crc = _HEADER.unpack(header)
    (check,) = _CHECK.unpack_from(data, at + _HEADER.size)
    head_at = at + HEADER_BYTES
    blob_at, end = head_at + head_bytes, head_at + head_bytes + blob_bytes
    if magic != _MAGIC or zlib.crc32(header) != check or end > len(data):
        return None
    head, blob = data[head_at:blob_at], data[blob_at:end]
    if zlib.crc32(blob, zlib.crc32(head)) != crc:
        return None
    return LogRecord(kind=kind, head=head, blob=blob, blob_at=start + blob_at, end=start + end)
