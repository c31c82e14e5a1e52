"""Folders of pictures into an index, through a bundle's image tower: streamed, and only what has changed."""

from __future__ import annotations

import asyncio
import io
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress, Task
from edgeglm.data.transforms import (
    ImagePreprocessing,
    decoded_image,
    model_input_from_pixels,
    shown_pixels,
)
from edgeglm.index.contents import Entry
from edgeglm.index.picture_files import SUFFIXES, PictureFile, first_part, known_folder, picture_files
from edgeglm.index.records import metadata_of
from edgeglm.index.writer import IndexWriter, NewRow
from edgeglm.runtime.runner import Runner

if TYPE_CHECKING:
    from PIL.Image import Image

_BATCH = 256  # rows of one log record: what a kill can cost
_WINDOW = 64  # pictures decoded or waiting for the tower at a time
_SHOWN = 5
_CHANGING = ("bytes", "modified")  # what a file says of itself that may differ under the same id
_STAMP = re.compile(r"\d+--?\d+(-[0-9a-f]{16})?")  # of a file, and what was said of it


@dataclass(kw_only=True)
class PictureCounts:
    """What became of a folder's files.

    ``unmatched`` counts metadata of pictures that the folder has not; ``examples`` are the first few reasons
    for what was skipped or unmatched. ``unfolded`` says why the index's log could not be folded, if so; its
    rows are kept all the same.
    """

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    removed: int = 0
    unmatched: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    unfolded: str = ""

    def skip(self, reason: str, example: str) -> None:
        """Count one file that is left out."""
        self.skipped[reason] += 1
        self._show(example)

    def miss(self, name: str) -> None:
        """Count metadata that belong to no picture."""
        self.unmatched += 1
        self._show(f"the metadata of {name[:100]!r}: the folder has no such picture")

    def _show(self, example: str) -> None:
        if len(self.examples) < _SHOWN:
            self.examples.append(example)


async def index_pictures(
    writer: IndexWriter,
    runner: Runner,
    preprocessing: ImagePreprocessing,
    folder: Path,
    progress: Progress,
    *,
    prefix: str | None = None,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
    skip_bad: bool = False,
    prune: bool = False,
    allow_empty: bool = False,
    threads: int = 2,
) -> PictureCounts:
    """Bring an index up to date with a folder.

    Pictures whose size and time of change are as before are left alone. Every batch is on disk before the
    next begins, so a run that was killed goes on where it stopped. What was said of a picture stays until
    ``metadata`` says something else of it.

    Args:
        writer: The index.
        runner: Open, with the image tower.
        preprocessing: Of the bundle.
        folder: Pictures, at any depth.
        progress: Gets a step a file.
        prefix: First part of the ids, see ``picture_files``.
        metadata: More fields by path within the folder.
        skip_bad: Leave out and count what cannot be decoded, instead of stopping.
        prune: Remove rows of this prefix, all of them for "", whose file the folder has not.
        allow_empty: Prune for a folder without a picture too. It may well be a mount that is not there.
        threads: That decode.

    Raises:
        UserError: The first bad picture, unless they are skipped; a full disk; no pictures at all; metadata
            that say nothing of the one picture.
    """
    counts = PictureCounts()
    listed, more = [], metadata or {}
    if folder.is_file():
        if prune:
            raise UserError(f"{folder} is one picture; give a folder to prune, or leave --prune out")
        if prefix is None:
            prefix = known_folder(folder, writer.contents.entries)
    for found in picture_files(folder, prefix=prefix):
        if isinstance(found, PictureFile):
            listed.append(found)
        elif prune and found[0] == "unreadable":
            raise UserError(
                f"{found[1]}, and so nobody knows what is gone; make it readable, or leave --prune out"
            )
        else:
            _bad(counts, *found, skip=skip_bad)
    if not listed and not (prune and allow_empty):
        rest = ", mount what belongs there, or give --allow-empty to remove all of its rows" if prune else ""
        raise UserError(
            f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}); give a folder that does{rest}"
        )
    root = folder if folder.is_dir() else folder.parent
    wanted = []
    names = {picture.path.relative_to(root).as_posix() for picture in listed}
    if folder.is_file() and more and not names & more.keys():
        raise UserError(f"the metadata say nothing of {folder}; call it {folder.name!r} there")
    for name in more if folder.is_dir() else ():
        if name not in names:
            counts.miss(name)
    for picture in listed:
        known = writer.contents.entries.get(picture.id)
        one = _described(picture, more.get(picture.path.relative_to(root).as_posix()), known)
        if known is not None and known.stamp == one.stamp:
            counts.unchanged += 1
            continue
        wanted.append(one)
        counts.added, counts.replaced = counts.added + (known is None), counts.replaced + (known is not None)
    with (
        progress.task(f"index {folder.name}", len(wanted)) as task,
        ThreadPoolExecutor(max(threads, 1), "edgeglm-decode") as pool,
    ):
        await _Stream(writer, runner, preprocessing, counts, task, pool, skip_bad).run(wanted)
    if prune:
        counts.removed = _pruned(writer, folder, prefix, {picture.id for picture in listed})
    counts.unfolded = writer.unfolded
    return counts


class _Stream:
    """Decodes, embeds and writes, with a bounded number of pictures in memory."""

    def __init__(
        self,
        writer: IndexWriter,
        runner: Runner,
        preprocessing: ImagePreprocessing,
        counts: PictureCounts,
        task: Task,
        pool: ThreadPoolExecutor,
        skip_bad: bool,
    ) -> None:
        self._writer, self._runner, self._preprocessing = writer, runner, preprocessing
        self._counts, self._task, self._pool, self._skip_bad = counts, task, pool, skip_bad

    async def run(self, pictures: list[PictureFile]) -> None:
        """Take all of them, in order."""
        rows: list[NewRow] = []
        vectors: list[npt.NDArray[np.float32]] = []
        waiting: list[asyncio.Task[tuple[bytes, npt.NDArray[np.float32]]]] = []
        todo = iter(pictures)
        order: list[PictureFile] = []
        try:
            while True:
                while len(waiting) < _WINDOW and (picture := next(todo, None)) is not None:
                    waiting.append(asyncio.ensure_future(self._one(picture)))
                    order.append(picture)
                if not waiting:
                    break
                picture, task = order.pop(0), waiting.pop(0)
                try:
                    thumbnail, vector = await task
                except UserError as error:
                    known = self._writer.stamp(picture.id) is not None
                    self._counts.added -= not known
                    self._counts.replaced -= known
                    _bad(self._counts, "not a readable picture", str(error), skip=self._skip_bad)
                else:
                    rows.append(
                        NewRow(
                            id=picture.id,
                            metadata=picture.metadata,
                            stamp=picture.stamp,
                            picture=thumbnail,
                        )
                    )
                    vectors.append(vector)
                self._task.advance()
                if len(rows) == _BATCH:
                    await self._write(rows, vectors)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        await self._write(rows, vectors)

    async def _write(self, rows: list[NewRow], vectors: list[npt.NDArray[np.float32]]) -> None:
        if rows:
            adding = asyncio.ensure_future(asyncio.to_thread(self._writer.add, list(rows), np.stack(vectors)))
            try:
                await asyncio.shield(adding)
            finally:  # an interrupt ends no thread, and must not end the writer's lock before it
                await asyncio.wait([adding])
            rows.clear()
            vectors.clear()

    async def _one(self, picture: PictureFile) -> tuple[bytes, npt.NDArray[np.float32]]:
        loop = asyncio.get_running_loop()
        thumbnail, pixels = await loop.run_in_executor(
            self._pool, prepared, picture.path, self._preprocessing, self._writer.header.thumbnail_side
        )
        outputs = await self._runner.infer("image", {"pixels": pixels})
        return thumbnail, np.asarray(outputs["embedding"], np.float32)


def prepared(
    source: Path | bytes, preprocessing: ImagePreprocessing, side: int
) -> tuple[bytes, npt.NDArray[np.float32]]:
    """Decode a picture once; return its thumbnail (WebP, empty for ``side`` 0) and float32 [3, R, R].

    Raises UserError for a file that is no whole picture.
    """
    image = decoded_image(source, background=preprocessing.background)
    sample = model_input_from_pixels(shown_pixels(image, preprocessing)[None], preprocessing.resolution)[0]
    return (thumbnail_of(image, side) if side else b""), sample


def thumbnail_of(image: Image, side: int) -> bytes:
    """Return an RGB picture as WebP whose longer side is at most ``side`` pixels."""
    small = image.copy() if max(image.size) <= side else image
    if small is image:
        from PIL import Image as Images

        ratio = side / max(image.size)
        size = (max(round(image.width * ratio), 1), max(round(image.height * ratio), 1))
        small = image.resize(size, Images.Resampling.BICUBIC, reducing_gap=2.0)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82, method=1)
    return buffer.getvalue()


def _bad(counts: PictureCounts, reason: str, example: str, *, skip: bool) -> None:
    if not skip:
        raise UserError(f"{example.rstrip('.')}, or give --skip-bad to leave such files out and count them")
    counts.skip(reason, example)


def _described(picture: PictureFile, fields: Mapping[str, Any] | None, known: Entry | None) -> PictureFile:
    """Return a picture with what is said of it: ``fields``, or for None what its row says already."""
    if fields is not None:
        mark = f"-{_hash(fields)}" if fields else ""
    elif known is not None:
        fields = {name: value for name, value in metadata_of(known.metadata).items() if name not in _CHANGING}
        match = _STAMP.fullmatch(known.stamp)
        mark = (match[1] if match else None) or ""
    else:
        fields, mark = {}, ""
    return replace(picture, stamp=picture.stamp + mark, metadata={**picture.metadata, **fields})


def _pruned(writer: IndexWriter, folder: Path, prefix: str | None, present: set[str]) -> int:
    before = first_part(folder, prefix)
    start = f"{before}/" if before else ""
    gone = [id for id in writer.contents.entries if id.startswith(start) and id not in present]
    return writer.remove(gone)


def _hash(fields: Mapping[str, Any]) -> str:
    from edgeglm.core.digest import sha256_bytes

    return sha256_bytes(msgspec.msgpack.encode(dict(fields), order="deterministic"))[:16]
