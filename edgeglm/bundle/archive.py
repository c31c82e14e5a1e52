"""Write a bundle folder as one file. The same bundle gives the same bytes.

The manifest comes first, so that a reader knows every name, size and digest before it meets them;
the rest follows by name, with owner, mode and time fixed.
"""

from __future__ import annotations

import importlib
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import IO, Literal

from edgeglm.bundle.manifest import MANIFEST_NAME, SIGNATURES_NAME
from edgeglm.bundle.paths import inside
from edgeglm.core.errors import UserError

ArchiveKind = Literal["none", "tar.zst", "zip"]

_MODE = 0o644
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time the format knows
_CHUNK_BYTES = 1 << 20
_ZSTD_LEVEL = 9


def archive_from_folder(folder: Path, names: Iterable[str], archive: Path, kind: ArchiveKind) -> None:
    """Write the named files of ``folder`` to ``archive`` and sync it. Raises OSError when it cannot."""
    # The signatures come second: a reader holds the manifest against them before it parses it.
    signed = [SIGNATURES_NAME] if (folder / SIGNATURES_NAME).is_file() else []
    ordered = [MANIFEST_NAME, *signed, *sorted(set(names) - {MANIFEST_NAME, SIGNATURES_NAME})]
    with archive.open("wb") as out:
        if kind == "zip":
            _write_zip(folder, ordered, out)
        else:
            _write_tar_zst(folder, ordered, out)
        out.flush()
        os.fsync(out.fileno())


def zstandard() -> ModuleType:
    """Import ``zstandard``. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        raise UserError(
            "a .tar.zst bundle needs the package zstandard; install it, or use a .zip or folder bundle"
        ) from error


def _write_tar_zst(folder: Path, names: Iterable[str], out: IO[bytes]) -> None:
    compressor = zstandard().ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
    with compressor.stream_writer(out, closefd=False) as stream:
        for name in names:
            path = inside(folder, name)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = path.stat().st_size, _MODE
            stream.write(entry.tobuf(format=tarfile.USTAR_FORMAT, encoding="utf-8", errors="strict"))
            with path.open("rb") as file:
                shutil.copyfileobj(file, stream, _CHUNK_BYTES)
            stream.write(bytes(-entry.size % tarfile.BLOCKSIZE))
        stream.write(bytes(2 * tarfile.BLOCKSIZE))


def _write_zip(folder: Path, names: Iterable[str], out: IO[bytes]) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            path = inside(folder, name)
            entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
            entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3
            entry.external_attr = (stat.S_IFREG | _MODE) << 16
            entry.file_size = path.stat().st_size
            with path.open("rb") as file, archive.open(entry, "w") as stream:
                shutil.copyfileobj(file, stream, _CHUNK_BYTES)
