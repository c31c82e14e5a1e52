"""A generation: the rows of an index as immutable files, beside the log of what came after.

gen-000001/rows.msgpack     ids, metadata, where each picture is
gen-000001/exact.npy        float16 [N, D], L2-normalised: what scores are made of
gen-000001/int8.npy         uint8 [N, D]; binary.npy, uint8 [N, ceil(D / 8)]: what is scanned
gen-000001/centre.npy       float32 [D]: the mean that bits are taken from
gen-000001/thumbnails.bin   pictures, one after the other
gen-000001/manifest.json    sha256 and size of each of these
gen-000001/log              what was added and removed since
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edgeglm.core.digest import sha256_file
from edgeglm.core.durable import sync_path, take_place
from edgeglm.core.errors import UserError
from edgeglm.index.codes import (
    ByteRows,
    FloatRow,
    HalfRows,
    binary_codes,
    centre_of,
    int8_codes,
    int8_scale,
)
from edgeglm.index.records import GenerationManifest, StoredRow

LOG_NAME = "log"
_ROWS, _THUMBNAILS, _MANIFEST, _CENTRE = "rows.msgpack", "thumbnails.bin", "manifest.json", "centre.npy"
_ARRAYS = ("exact", "int8", "binary")
_BLOCK = 4096  # rows coded at a time


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The three forms of the same N rows."""

    exact: HalfRows
    int8: ByteRows
    binary: ByteRows
    centre: FloatRow

    def __len__(self) -> int:
        return len(self.exact)

    def taken(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Codes:
        """Return copies of some rows."""
        return Codes(
            exact=self.exact[rows], int8=self.int8[rows], binary=self.binary[rows], centre=self.centre
        )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """An opened generation. ``pictures`` is a file descriptor that outlives the folder.

    ``state`` is that of the folder as it was opened: another program that puts files into it changes it.
    """

    folder: Path
    state: tuple[int, ...]
    manifest: GenerationManifest
    rows: tuple[StoredRow, ...]
    codes: Codes
    pictures: int

    @property
    def is_as_opened(self) -> bool:
        """Say whether no file of it was replaced since, as rsync does: the log alone grows in place."""
        return _state(self.folder) == self.state

    def close(self) -> None:
        """Close the pictures."""
        os.close(self.pictures)


def codes_of(exact: HalfRows, scale: float, centre: FloatRow) -> Codes:
    """Code rows as they are stored in float16, whether they come from the log or from a generation."""
    wide = exact.astype(np.float32)
    return Codes(exact=exact, int8=int8_codes(wide, scale), binary=binary_codes(wide, centre), centre=centre)


def joined_codes(parts: Iterable[Codes]) -> Codes:
    """Put several one after the other; at least one is needed."""
    listed = list(parts)
    if len(listed) == 1:
        return listed[0]
    arrays = {name: np.concatenate([getattr(part, name) for part in listed]) for name in _ARRAYS}
    return Codes(**arrays, centre=listed[0].centre)


def write_generation(
    folder: Path,
    *,
    dimensions: int,
    rows: Iterable[tuple[StoredRow, bytes]],
    exact: HalfRows,
    next_sequence: int,
) -> None:
    """Fill a new folder and sync every file of it; the log is empty.

    Args:
        folder: To be made.
        dimensions: D.
        rows: Each with its picture, in the order of ``exact``; where the picture lies is filled in here.
        exact: float16 [N, D].
        next_sequence: The number of the next row that will be added.
    """
    folder.mkdir()
    stored, at = [], 0
    with (folder / _THUMBNAILS).open("wb") as file:
        for row, picture in rows:
            stored.append(msgspec.structs.replace(row, picture=(at, len(picture))))
            file.write(picture)
            at += len(picture)
    assert len(stored) == len(exact), (len(stored), len(exact))
    (folder / _ROWS).write_bytes(msgspec.msgpack.encode(stored))
    shapes = {
        "exact": (np.float16, dimensions),
        "int8": (np.uint8, dimensions),
        "binary": (np.uint8, -(-dimensions // 8)),
    }
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=kind, shape=(max(len(exact), 1), width)
        )
        for name, (kind, width) in shapes.items()
    }
    for name in arrays:
        take_place(folder / f"{name}.npy")
    scale, centre = int8_scale(exact), centre_of(exact)
    np.save(folder / _CENTRE, centre)
    for start in range(0, len(exact), _BLOCK):
        codes = codes_of(exact[start : start + _BLOCK], scale, centre)
        for name, array in arrays.items():
            array[start : start + len(codes)] = getattr(codes, name)
    for array in arrays.values():
        array.flush()
    names = (_ROWS, _THUMBNAILS, _CENTRE, *(f"{name}.npy" for name in _ARRAYS))
    manifest = GenerationManifest(
        rows=len(exact),
        next_sequence=next_sequence,
        scale=scale,
        files={name: (sha256_file(folder / name), (folder / name).stat().st_size) for name in names},
    )
    (folder / _MANIFEST).write_bytes(msgspec.json.encode(manifest))
    (folder / LOG_NAME).write_bytes(b"")
    for path in (*folder.iterdir(), folder):
        sync_path(path)


def opened_generation(folder: Path) -> Generation:
    """Open a generation: the sizes are checked, the arrays stay on disk until they are used.

    Raises:
        FileNotFoundError: The folder is gone: a newer one has taken its place.
        UserError: A part is missing or damaged.
    """
    state = _state(folder)
    try:
        manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=GenerationManifest)
        for name, (_, size) in manifest.files.items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has not the {size} bytes that were written")
        rows = msgspec.msgpack.decode((folder / _ROWS).read_bytes(), type=tuple[StoredRow, ...])
        # plain arrays over the files, so that what is picked from them is plain too
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS}
        centre = np.load(folder / _CENTRE)
        if len(rows) != manifest.rows or any(len(a) != max(manifest.rows, 1) for a in arrays.values()):
            raise ValueError(f"{len(rows)} rows where {manifest.rows} were written")
    except FileNotFoundError:
        if folder.is_dir() and (folder / _MANIFEST).is_file():
            raise _damaged(folder, "a file is missing") from None
        raise
    except (msgspec.MsgspecError, ValueError, OSError) as error:
        raise _damaged(folder, error) from error
    codes = Codes(**{name: array[: manifest.rows] for name, array in arrays.items()}, centre=centre)
    pictures = os.open(folder / _THUMBNAILS, os.O_RDONLY | os.O_CLOEXEC)
    return Generation(
        folder=folder, state=state, manifest=manifest, rows=rows, codes=codes, pictures=pictures
    )


def damaged_files(generation: Generation) -> Iterator[str]:
    """Hash every file; name those that are not what was written."""
    for name, (digest, _) in generation.manifest.files.items():
        if sha256_file(generation.folder / name) != digest:
            yield name


def _state(folder: Path) -> tuple[int, ...]:
    """Return what changes with the names in a folder. Its mtime does too, but rsync sets that back.

    The log besides: it is what changes most, and two changes of one tick of the clock have one ctime.
    """
    try:
        found = folder.stat()
        return found.st_ino, found.st_ctime_ns, (folder / LOG_NAME).stat().st_ino
    except OSError:
        return ()


def _damaged(folder: Path, why: object) -> UserError:
    return UserError(f"{folder} is damaged: {why}; restore the index from a copy, or build it again")
