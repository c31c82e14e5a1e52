"""Samples on disk as batches: written row by row, read through a memory map, so that memory does not grow.

An ``.npz`` is a zip of ``.npy`` files. Stored uncompressed, each array lies in it as in a file of its own,
which ``numpy.load`` does not use: it reads the whole array. ``mapped_npz`` maps it where it lies.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
_LOCAL_HEADER_BYTES = 30  # of a zip entry, before its name and extra field (APPNOTE.TXT 4.3.7)
_COPY_BYTES = 1 << 20


class Batches(Sequence[dict[str, Array]]):
    """Arrays of n samples as batches of ``batch_size``, the last one shorter. Nothing is held in memory.

    Slicing gives fewer batches of the same arrays: ``batches[:-2]``.
    """

    def __init__(
        self, arrays: Mapping[str, Array], batch_size: int, *, start: int = 0, stop: int | None = None
    ) -> None:
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) > 1:
            raise UserError(
                f"the inputs have different numbers of samples ({counts}); match their first axes"
            )
        self.arrays = dict(arrays)
        self.batch_size = batch_size
        self.start = start
        self.stop = min(next(iter(counts.values()), 0), stop if stop is not None else 1 << 62)

    @property
    def samples(self) -> int:
        """How many samples all batches together hold."""
        return max(self.stop - self.start, 0)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.samples // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> dict[str, Array]: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> dict[str, Array] | Batches:
        """Return one batch, read now; or the batches of a slice, not read yet."""
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1:
                raise ValueError("batches are sliced in steps of 1")
            begin = self.start + first * self.batch_size
            end = min(self.start + max(first, last) * self.batch_size, self.stop)
            return Batches(self.arrays, self.batch_size, start=begin, stop=max(begin, end))
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        begin = self.start + position * self.batch_size
        rows = slice(begin, min(begin + self.batch_size, self.stop))
        batch = {name: np.array(native(array[rows])) for name, array in self.arrays.items()}
        forget_pages(self.arrays.values())
        return batch

    def first(self, samples: int) -> Batches:
        """Return the batches of the first ``samples`` samples."""
        return Batches(
            self.arrays, self.batch_size, start=self.start, stop=min(self.start + samples, self.stop)
        )

    def halves(self) -> tuple[Batches, Batches]:
        """Return the first half of the rows and the rest, in batches of half the rows at most."""
        half = max(1, self.samples // 2)
        middle, size = self.start + half, min(half, self.batch_size)
        head = Batches(self.arrays, size, start=self.start, stop=min(middle, self.stop))
        return head, Batches(self.arrays, size, start=middle, stop=self.stop)


def native(array: Array) -> Array:
    """Return an array in the order of bytes that runtimes take every array to be in."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def forget_pages(arrays: Iterable[Array]) -> None:
    """Give back the pages of maps that were read: they would count as this process's memory."""
    for array in arrays:
        mapped = getattr(array, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def batches_of(feeds: Sequence[Feeds]) -> int:
    """Return how many samples a sequence of batches holds."""
    if isinstance(feeds, Batches):
        return feeds.samples
    return sum(len(next(iter(batch.values()))) for batch in feeds)


def mapped_npz(path: Path) -> dict[str, Array]:
    """Return the arrays of an ``.npz``, mapped where they lie; compressed ones are unpacked to disk first.

    Raises UserError when the file is no ``.npz``, or holds pickled objects.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            arrays: dict[str, Array] = {}
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if entry.compress_type != zipfile.ZIP_STORED:
                    # Without a name: the map keeps the bytes, and they go with it.
                    with archive.open(entry) as file, tempfile.TemporaryFile() as unpacked:
                        shutil.copyfileobj(file, unpacked, _COPY_BYTES)
                        arrays[name] = _mapped(unpacked, unpacked, 0)
                else:
                    arrays[name] = _mapped(path, raw, _start_of(raw, entry))
    except FileNotFoundError:
        raise UserError(f"no file at {path}; give the path of an .npz") from None
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is no .npz that can be read ({error}); write it with numpy.savez") from error
    return arrays


def _start_of(raw: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return where the bytes of an entry begin."""
    raw.seek(entry.header_offset)
    header = raw.read(_LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes


def _mapped(file: Path | BinaryIO, raw: BinaryIO, start: int) -> Array:
    """Map the ``.npy`` at ``start``. A path is opened anew by numpy, and closed with the array."""
    raw.seek(start)
    version = np.lib.format.read_magic(raw)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(raw)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    order: Literal["C", "F"] = "F" if fortran else "C"
    if 0 in shape:
        return np.empty(shape, dtype)
    mapped: Array = np.memmap(file, dtype=dtype, mode="r", offset=raw.tell(), shape=shape, order=order)
    return mapped


def write_npz(path: Path, chunks: Iterable[Feeds], samples: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Write chunks of samples, one after the other, as one ``.npz`` of plain arrays [samples, ...].

    Like ``numpy.savez``, whose entries carry the time of day, but in the memory of one chunk and with the
    same bytes every time.

    Returns:
        ``{name: (dtype, shape)}``.

    Raises:
        UserError: A chunk has other names, dtypes or shapes than the first, NaN or infinity, or the
            chunks hold another number of samples.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".npz-") as scratch:
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        raw: dict[str, Path] = {}  # numbered: a name such as "model/input:0" is no file's
        rows = 0
        for chunk in chunks:
            if found and set(chunk) != set(found):
                raise UserError(
                    f"samples have the inputs {sorted(chunk)} and {sorted(found)}; make them alike"
                )
            counts = {len(array) for array in chunk.values()}
            if len(counts) != 1:
                raise UserError("the inputs of one chunk have different numbers of rows; match them")
            for name, array in chunk.items():
                known = found.setdefault(name, (array.dtype.name, (samples, *array.shape[1:])))
                if known != (array.dtype.name, (samples, *array.shape[1:])):
                    raise UserError(
                        f"{name!r} is {array.dtype.name}{list(array.shape[1:])} in one sample and "
                        f"{known[0]}{list(known[1][1:])} in another; make all samples alike"
                    )
                require_finite(name, array)
                with raw.setdefault(name, Path(scratch, str(len(raw)))).open("ab") as file:
                    file.write(np.ascontiguousarray(array).data)
            rows += counts.pop()
        if rows != samples:
            raise UserError(f"{rows} rows for {samples} samples; match them")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (dtype, shape) in sorted(found.items()):
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=_ZIP_EPOCH)
                with (
                    archive.open(entry, "w", force_zip64=True) as out,
                    raw[name].open("rb") as file,
                ):
                    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(out, header)
                    shutil.copyfileobj(file, out, _COPY_BYTES)
    return dict(sorted(found.items()))


def require_finite(name: str, array: Array) -> None:
    """Raise UserError if a float array holds NaN or infinity."""
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise UserError(f"calibration input {name!r} holds NaN or infinity; remove those samples")
