"""The one writer of an index."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from edgeglm.bundle.atomic import disk_errors
from edgeglm.core.durable import sync_path
from edgeglm.core.errors import UserError
from edgeglm.index.codes import FloatRows, unit_rows
from edgeglm.index.contents import Contents
from edgeglm.index.generation import LOG_NAME, damaged_files, write_generation
from edgeglm.index.log import AppendLog, LogRecord
from edgeglm.index.records import ADDED, REMOVED, Added, AddedRow, Removed, StoredRow
from edgeglm.index.vector_index import current_generation, header_of, opened_contents, write_current

FOLD_BYTES = 32 << 20
MAX_ID_BYTES = 1024
MAX_METADATA_BYTES = 64 << 10
_WAIT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class NewRow:
    """A row to add. ``stamp`` says later whether its source has changed; ``picture`` is an encoded image."""

    id: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stamp: str = ""
    picture: bytes = b""


class IndexWriter:
    """Changes an index. Use it as a context manager: it holds the index's lock, so there is one at a time.

    Args:
        path: The index.
        fold_bytes: The log is folded into a new generation when it is longer than this and than half of
            the generation's arrays.
        wait: Seconds to wait for another writer.
    """

    def __init__(self, path: Path, *, fold_bytes: int = FOLD_BYTES, wait: float = _WAIT_SECONDS) -> None:
        self.path = path
        self.header = header_of(path)
        self.fold_bytes = fold_bytes
        self.unfolded = ""
        """Why the log could not be folded the last time; empty if it could."""
        self._wait = wait
        self._lock = -1
        self._contents: Contents | None = None
        self._log: AppendLog | None = None

    def __enter__(self) -> IndexWriter:
        """Take the lock and cut off what a killed writer left unfinished. Raises UserError."""
        with disk_errors(self.path):
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take_lock()
            self._open()
            self._sweep()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back."""
        self._close()

    @property
    def contents(self) -> Contents:
        """What the index holds now."""
        assert self._contents is not None, "use the writer in a 'with' statement"
        return self._contents

    def stamp(self, id: str) -> str | None:
        """Return the stamp of a row, None if there is no such row."""
        entry = self.contents.entries.get(id)
        return None if entry is None else entry.stamp

    def matching(self, where: Mapping[str, Any]) -> list[str]:
        """Return the ids of the rows that a filter takes. Raises UserError as ``Columns.mask`` does."""
        view = self.contents.view()
        return [view.entries[row].id for row in np.flatnonzero(view.columns.mask(where))]

    def add(self, rows: Sequence[NewRow], vectors_ND: FloatRows) -> None:
        """Add rows, or replace those whose id is known: all of them or, if it raises, none.

        When it returns they are on disk. The embeddings, float32 [N, D], are normalised.

        Raises:
            UserError: A full disk; an id twice, empty or too long; metadata that is too large or no plain
                data; another number of dimensions; an embedding of zeros, NaN or infinity.
        """
        if not rows:
            return
        vectors = _checked_vectors(vectors_ND, len(rows), self.header.dimensions)
        encoded = [_encoded(row) for row in rows]
        if len({row.id for row in rows}) != len(rows):
            raise UserError("an id comes twice in one call; give each row its own")
        head = msgspec.msgpack.encode(Added(self.contents.next_sequence, tuple(encoded)))
        blob = vectors.astype("<f2").tobytes() + b"".join(row.picture for row in rows)
        self._append(ADDED, head, blob)

    def remove(self, ids: Iterable[str]) -> int:
        """Remove rows; return how many were there. When it returns the removal is on disk."""
        known = tuple(dict.fromkeys(id for id in ids if id in self.contents.entries))
        if known:
            self._append(REMOVED, msgspec.msgpack.encode(Removed(known)))
        return len(known)

    def fold(self) -> None:
        """Write a new generation of what is there now and let it count.

        Raises UserError on a full disk, and for a damaged generation: the new one would vouch for the damage.
        """
        contents = self.contents
        if damaged := ", ".join(damaged_files(contents.generation)):
            folder = contents.generation.folder
            raise UserError(
                f"{folder} is damaged: {damaged}; restore the index from a copy, or build it again"
            )
        former = contents.generation.folder
        name = f"gen-{int(former.name[4:]) + 1:06d}"
        staging = self.path / f".{name}.writing"
        view = contents.view()
        rows = (
            (StoredRow(entry.sequence, entry.id, entry.stamp, entry.metadata, (0, 0)), picture)
            for entry, picture in contents.with_pictures(view.entries)
        )
        with disk_errors(self.path):
            try:
                write_generation(
                    staging,
                    dimensions=self.header.dimensions,
                    rows=rows,
                    exact=view.codes.exact,
                    next_sequence=contents.next_sequence,
                )
                staging.rename(self.path / name)
                sync_path(self.path)
                write_current(self.path, name)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
        self._open()
        self._sweep()

    def _append(self, kind: int, head: bytes, blob: bytes = b"") -> None:
        assert self._log is not None
        blob_at = self._log.append(kind, head, blob)
        record = LogRecord(kind=kind, head=head, blob=blob, blob_at=blob_at, end=self._log.end)
        self.contents.apply(record)
        arrays = sum(size for _, size in self.contents.generation.manifest.files.values())
        if self._log.end > max(self.fold_bytes, arrays // 2):
            try:
                self.fold()
                self.unfolded = ""
            except UserError as error:  # the record is kept all the same
                self.unfolded = str(error)

    def _open(self) -> None:
        fresh = opened_contents(self.path, self.header.dimensions)
        if self._contents is not None:
            self._contents.close()
        if self._log is not None:
            self._log.close()
        self._contents = fresh
        self._log = AppendLog(fresh.generation.folder / LOG_NAME, fresh.end)

    def _take_lock(self) -> None:
        deadline = time.monotonic() + self._wait
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process is changing {self.path}; wait until it has ended and try again"
                    ) from None
                time.sleep(0.05)

    def _sweep(self) -> None:
        """Remove what no longer counts: former generations, and what killed writers left."""
        current = current_generation(self.path)
        for folder in self.path.iterdir():
            grave = self.path / f".{folder.name}.removed"
            if folder.name.startswith("gen-") and folder.name != current:
                shutil.rmtree(grave, ignore_errors=True)
                with suppress(OSError):
                    folder.rename(grave)  # at once: no reader meets half a generation
                    shutil.rmtree(grave, ignore_errors=True)
            elif folder.name.startswith(".gen-"):
                shutil.rmtree(folder, ignore_errors=True)

    def _close(self) -> None:
        if self._contents is not None:
            self._contents.close()
            self._contents = None
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _encoded(row: NewRow) -> AddedRow:
    try:
        name = row.id.encode()
        metadata = msgspec.msgpack.encode(dict(row.metadata))
        # What a filter or a page cannot take is refused before it is on disk.
        msgspec.json.encode(msgspec.msgpack.decode(metadata, type=dict[str, Any]))
    except (UnicodeEncodeError, msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the row {row.id!r} cannot be kept: {error}; give text and plain data") from error
    if not 0 < len(name) <= MAX_ID_BYTES:
        raise UserError(f"an id has {len(name)} bytes; give 1 to {MAX_ID_BYTES}")
    if len(metadata) > MAX_METADATA_BYTES:
        raise UserError(
            f"the metadata of {row.id!r} take {len(metadata)} bytes; give at most {MAX_METADATA_BYTES}"
        )
    return AddedRow(row.id, row.stamp, msgspec.Raw(metadata), len(row.picture))


def _checked_vectors(vectors_ND: FloatRows, count: int, dimensions: int) -> FloatRows:
    vectors = np.asarray(vectors_ND, np.float32)
    if vectors.shape != (count, dimensions):
        raise UserError(
            f"{count} rows came with embeddings of {list(vectors.shape)}; give [{count}, {dimensions}]"
        )
    try:
        return unit_rows(vectors)
    except ValueError as error:
        raise UserError(str(error)) from error
