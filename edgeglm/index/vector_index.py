"""An index on disk: made, opened, searched, while one writer at a time changes it.

    <index>/index.json      what it is of; written once
    <index>/CURRENT         which generation counts; replaced in one step
    <index>/gen-000001/     the rows, and the log of what came after (``edgeglm.index.generation``)
    <index>/lock            held by the writer

A change is a synced record of the log: once ``add`` or ``remove`` returns, ``kill -9`` or a power cut loses
nothing of it. Before that it is wholly there or not at all. A log that has grown long is folded into a new
generation, published by replacing CURRENT; readers go on with the files they have open.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from edgeglm.bundle.atomic import disk_errors, put_in_place, staging_folder
from edgeglm.core.errors import UserError
from edgeglm.index.codes import FloatRows
from edgeglm.index.contents import Contents, Entry, View
from edgeglm.index.generation import damaged_files, write_generation
from edgeglm.index.records import CURRENT_NAME, HEADER_NAME, IndexHeader, header_from_bytes, metadata_of

FIRST_GENERATION = "gen-000001"
_TRIES = 20  # a reader may meet the moment in which a generation is replaced


@dataclass(frozen=True, kw_only=True)
class Match:
    """One result. ``score`` is the cosine; ``row`` is the row's number, never given twice."""

    score: float
    row: int
    id: str
    metadata: dict[str, Any]
    picture: bool


def create_index(path: Path, header: IndexHeader) -> None:
    """Make an empty index. Raises UserError if something is there already or cannot be written."""
    if path.exists():
        raise UserError(
            f"{path} is there already; add to it with 'edgeglm index add', or choose another folder"
        )
    with disk_errors(path), staging_folder(path) as staging:
        folder = staging / "index"
        folder.mkdir()
        encoded = msgspec.json.format(msgspec.json.encode(header), indent=1)
        _write_synced(folder / HEADER_NAME, encoded + b"\n")
        (folder / "lock").touch()
        nothing = np.zeros((0, header.dimensions), np.float16)
        write_generation(
            folder / FIRST_GENERATION, dimensions=header.dimensions, rows=(), exact=nothing, next_sequence=1
        )
        write_current(folder, FIRST_GENERATION)  # which syncs the names in the folder too
        put_in_place(folder, path)


def header_of(path: Path) -> IndexHeader:
    """Read what an index is of. Raises UserError where there is none."""
    file = path / HEADER_NAME
    try:
        return header_from_bytes(file.read_bytes(), str(file))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no index at {path}; make one with 'edgeglm index build'") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give an index that can be read") from error


def write_current(path: Path, generation: str) -> None:
    """Let a generation count from now on."""
    new = path / f".{CURRENT_NAME}.writing"
    _write_synced(new, generation.encode() + b"\n")
    put_in_place(new, path / CURRENT_NAME)


def opened_contents(path: Path, dimensions: int) -> Contents:
    """Open the generation that counts. Raises UserError where it is damaged."""
    for _ in range(_TRIES):
        name = current_generation(path)
        try:
            return Contents.opened(path / name, dimensions)
        except FileNotFoundError:
            if current_generation(path) == name and not (path / name).is_dir():
                break
    raise UserError(f"{path} is damaged: {name} is missing; restore the index from a copy, or build it again")


def current_generation(path: Path) -> str:
    """Return the name of the generation that counts. Raises UserError."""
    try:
        name = (path / CURRENT_NAME).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    if not (name.startswith("gen-") and name[4:].isdigit()):
        raise UserError(
            f"{path / CURRENT_NAME} names no generation; restore the index from a copy, or build it again"
        )
    return name


class VectorIndex:
    """An index, open for searching by several threads. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._closed = False
        self._current, self.header, self._contents = _opened(path)

    def __enter__(self) -> VectorIndex:
        """Return the index."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self.close()

    def __len__(self) -> int:
        return len(self._contents.entries)

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._closed = True
            self._contents.close()

    def view(self) -> View:
        """Return the rows as they are now, writers' changes included, as something that holds still.

        Another index of the same embedding space may have taken its place. Raises UserError for one of
        another space, where there is none any more, or a damaged one, and once this is closed.
        """
        with self._lock:
            if self._closed:
                raise UserError(f"{self.path} was closed; open it again")
            contents = self._contents
            if _identity(self.path / CURRENT_NAME) != self._current or not contents.generation.is_as_opened:
                current, header, fresh = _opened(self.path)
                if header.space != self.header.space:
                    fresh.close()
                    raise UserError(
                        f"the index {self.path} was replaced by one of another embedding space, "
                        f"{header.space[:12]} instead of {self.header.space[:12]}; open it again"
                    )
                fresh.version = contents.version + 1
                self._contents, self._current, self.header = fresh, current, header
                contents.close()
            elif contents.log_bytes > contents.end:
                contents.catch_up()
            return self._contents.view()

    def search(
        self,
        queries_QD: FloatRows,
        count: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        precision: str | None = None,
    ) -> list[list[Match]]:
        """Return the best rows for each query, the best first.

        Args:
            queries_QD: float32 [Q, D] or [D]; need not be normalised.
            count: How many rows, 1 or more; fewer come back where fewer are there.
            where: A filter on metadata, see ``edgeglm.index.filters``.
            precision: "int8", "binary" or "exact": what is scanned. The index's own for None.

        Raises:
            UserError: Another number of dimensions, an unknown precision, a filter that cannot be applied.
        """
        queries = np.atleast_2d(np.asarray(queries_QD, np.float32))
        if queries.shape[1] != self.header.dimensions:
            raise UserError(
                f"a query has {queries.shape[1]} dimensions, {self.path} has {self.header.dimensions}; "
                "embed it with the bundle that made the index"
            )
        view = self.view()
        chosen = np.flatnonzero(view.columns.mask(where)) if where else None
        rows, scores = view.scanner.nearest(
            queries, count, precision=precision or self.header.precision, chosen=chosen
        )
        return [
            [self._match(view.entries[row], float(score)) for row, score in zip(one, values, strict=True)]
            for one, values in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def picture(self, id: str) -> bytes | None:
        """Return the kept picture of a row (WebP), None if there is none, or no such row."""
        with self._lock:
            entry = self._contents.entries.get(id)
            return None if entry is None else self._contents.picture(entry) or None

    def check(self) -> list[str]:
        """Hash the generation's files; return the names of those that are damaged."""
        with self._lock:
            return list(damaged_files(self._contents.generation))

    @staticmethod
    def _match(entry: Entry, score: float) -> Match:
        return Match(
            score=score,
            row=entry.sequence,
            id=entry.id,
            metadata=metadata_of(entry.metadata),
            picture=entry.picture[1] > 0,
        )


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _opened(path: Path) -> tuple[tuple[int, int], IndexHeader, Contents]:
    """Open what is there, and say what tells it from what takes its place. Raises UserError."""
    while True:
        current = _identity(path / CURRENT_NAME)
        header = header_of(path)
        contents = opened_contents(path, header.dimensions)
        if _identity(path / CURRENT_NAME) == current:
            return current, header, contents
        contents.close()  # a header and rows that may be of two


def _identity(path: Path) -> tuple[int, int]:
    """Return what changes when the file is replaced: cheaper to ask than to read."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns
