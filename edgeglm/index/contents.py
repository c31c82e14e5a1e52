"""What an index holds at one moment: a generation and the log that followed, as rows and as arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from edgeglm.core.errors import UserError
from edgeglm.index.codes import HalfRows
from edgeglm.index.filters import Columns
from edgeglm.index.generation import LOG_NAME, Codes, Generation, codes_of, joined_codes, opened_generation
from edgeglm.index.log import LogRecord, replayed
from edgeglm.index.records import ADDED, REMOVED, Added, Removed
from edgeglm.index.search import Scanner

_ADDED = msgspec.msgpack.Decoder(Added)
_REMOVED = msgspec.msgpack.Decoder(Removed)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A row that is in the index now.

    Attributes:
        sequence: Its number, never given twice.
        id: Its name.
        stamp: What says whether its source has changed; empty if nobody asked.
        metadata: msgpack of a map.
        place: Its row among those of the generation and the log together.
        logged: Whether its picture lies in the log, and not in the generation.
        picture: First byte and length of its picture; no length for none.
    """

    sequence: int
    id: str
    stamp: str
    metadata: msgspec.Raw
    place: int
    logged: bool
    picture: tuple[int, int]


@dataclass(frozen=True)
class View:
    """Rows that hold still: row i of ``codes`` is ``entries[i]``. Searched from several threads."""

    entries: tuple[Entry, ...]
    codes: Codes
    version: int

    @cached_property
    def scanner(self) -> Scanner:
        """What searches the rows, made when it is first needed."""
        return Scanner(self.codes)

    @cached_property
    def columns(self) -> Columns:
        """The metadata by field, made when it is first filtered by."""
        return Columns(entry.metadata for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass
class Contents:
    """A generation with its log replayed up to ``end``. One thread at a time."""

    generation: Generation
    dimensions: int
    end: int = 0
    version: int = 0
    next_sequence: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    _tail: list[Codes] = field(default_factory=list)
    _places: int = 0
    _view: View | None = None
    _log: int = -1
    _closed: bool = False

    @classmethod
    def opened(cls, folder: Path, dimensions: int) -> Contents:
        """Open a generation and replay its log. Raises as ``opened_generation`` and ``replayed`` do."""
        generation = opened_generation(folder)
        contents = cls(generation=generation, dimensions=dimensions)
        contents.next_sequence = generation.manifest.next_sequence
        contents._places = len(generation.rows)
        contents.entries = {
            row.id: Entry(row.sequence, row.id, row.stamp, row.metadata, place, False, row.picture)
            for place, row in enumerate(generation.rows)
        }
        try:
            contents._log = os.open(folder / LOG_NAME, os.O_RDONLY | os.O_CLOEXEC)
            contents.catch_up()
        except BaseException:
            contents.close()
            raise
        return contents

    @property
    def log_bytes(self) -> int:
        """How many bytes the log has now; more than ``end`` when there is something to catch up with."""
        return os.fstat(self._log).st_size

    def catch_up(self) -> bool:
        """Replay what the log has got since; say whether anything changed."""
        records, end = replayed(self._log, self.generation.folder / LOG_NAME, self.end)
        for record in records:
            self.apply(record)
        self.end = end
        return bool(records)

    def apply(self, record: LogRecord) -> None:
        """Take one record in. Raises UserError for one that this version does not understand."""
        try:
            if record.kind == ADDED:
                self._add(_ADDED.decode(record.head), record.blob, record.blob_at)
            elif record.kind == REMOVED:
                for name in _REMOVED.decode(record.head).ids:
                    self.entries.pop(name, None)
            else:
                raise ValueError(f"a record of kind {record.kind}")
        except (msgspec.MsgspecError, ValueError) as error:
            raise UserError(
                f"the log of {self.generation.folder} holds what this edgeglm cannot read: {error}; "
                "upgrade edgeglm, or build the index again"
            ) from error
        self.end = record.end
        self.version += 1
        self._view = None

    def view(self) -> View:
        """Return what is searched: the files themselves while nothing has changed, else copies."""
        if self._view is None:
            parts = [self.generation.codes, *self._tail]
            codes = joined_codes([part for part in parts if len(part)] or parts)
            entries = tuple(self.entries.values())
            places = np.fromiter((entry.place for entry in entries), np.int64, len(entries))
            if not np.array_equal(places, np.arange(len(codes))):
                codes = codes.taken(places)
            self._view = View(entries, codes, self.version)
        return self._view

    def picture(self, entry: Entry) -> bytes:
        """Read the picture of an entry; empty if it has none. Raises UserError once this is closed."""
        if self._closed:  # the number of a closed file may be another file's by now
            raise UserError("the index was closed; open it again")
        at, length = entry.picture
        if length == 0:
            return b""
        return os.pread(self._log if entry.logged else self.generation.pictures, length, at)

    def with_pictures(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes]]:
        """Yield entries with their pictures."""
        for entry in entries:
            yield entry, self.picture(entry)

    def close(self) -> None:
        """Close the files; a view stays usable. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        self.generation.close()

    def _add(self, added: Added, blob: bytes, blob_at: int) -> None:
        count = len(added.rows)
        vector_bytes = 2 * self.dimensions * count
        if vector_bytes + sum(row.picture_bytes for row in added.rows) != len(blob):
            raise ValueError(f"{len(blob)} bytes for {count} rows of {self.dimensions} dimensions")
        exact: HalfRows = np.frombuffer(blob, "<f2", count * self.dimensions).reshape(count, -1)
        self._tail.append(
            codes_of(exact.copy(), self.generation.manifest.scale, self.generation.codes.centre)
        )
        at = blob_at + vector_bytes
        for number, row in enumerate(added.rows):
            self.entries.pop(row.id, None)  # a replaced row goes to the end, as its vector does
            self.entries[row.id] = Entry(
                added.first_sequence + number,
                row.id,
                row.stamp,
                row.metadata.copy(),
                self._places + number,
                True,
                (at, row.picture_bytes),
            )
            at += row.picture_bytes
        self._places += count
        self.next_sequence = max(self.next_sequence, added.first_sequence + count)
