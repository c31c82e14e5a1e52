"""Reading a person's own pairs: ``pairs.jsonl`` beside images, or a Parquet file. Nothing is decoded here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import msgspec

from edgeglm.core.errors import UserError
from edgeglm.data.languages import folded

PAIRS_FILE = "pairs.jsonl"
UNLABELLED_FOLDER = "unlabelled"
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BATCH_ROWS = 256


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``pairs.jsonl``. Other keys are let through: it is data, and often has more columns."""

    image: str
    text: str | None = None
    category: str | int | None = None
    subcategory: str | int | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image with one caption, or, unlabelled, with None. ``where`` is its line or row, for messages."""

    image: Path | bytes
    name: str
    text: str | None
    where: str
    category: str = ""
    subcategory: str = ""


class BadRecords:
    """What to do with bad records: raise at the first, or count them by reason (``skip_bad``)."""

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()

    def add(self, reason: str, message: str) -> None:
        """Count one bad record, or raise UserError with the message."""
        if not self.skip:
            raise UserError(
                f"{message}, or give --skip-bad (data.skip_bad = true) to leave such pairs out and count them"
            )
        self.counts[reason] += 1


def source_file(path: Path, kind: str) -> Path:
    """Return the file that lists the pairs: of a folder its ``pairs.jsonl``. Raises UserError."""
    if kind == "folder":
        if path.is_file():
            raise UserError(
                f"{path} is a file, and pairs come from a folder with {PAIRS_FILE} and the images, or from "
                "a Parquet file whose name ends in .parquet; give one of these"
            )
        if not path.is_dir():
            raise UserError(f"no folder at {path}; give the folder that holds {PAIRS_FILE} and the images")
        path = path / PAIRS_FILE
    if not path.is_file():
        what = 'one JSON object a line, {"image": path, "text": caption}' if kind == "folder" else "Parquet"
        raise UserError(f"no file at {path}; make it ({what})")
    return path


def records_of(file: Path, bad: BadRecords) -> Iterator[Record]:
    """Yield the records of a ``pairs.jsonl`` or, by any other name, a Parquet file.

    Image paths are relative to the file's folder and must stay inside it. A line without ``text`` is an
    unlabelled image, and so is every picture in the folder ``unlabelled`` beside a ``pairs.jsonl``. Bad
    lines, missing images and empty captions go to ``bad``. Raises UserError for those, for a path that
    climbs out, and for a file that cannot be read at all.
    """
    rows = _jsonl_rows(file, bad) if file.suffix == ".jsonl" else _parquet_rows(file)
    root = file.parent.resolve()
    for where, image, text, category, subcategory in rows:
        if text is not None and not isinstance(text, str):
            what = type(text).__name__
            bad.add("no text", f"{where}: the caption is of type {what}; write one text a row")
            continue
        if text is not None and not folded(text):
            bad.add("empty caption", f"{where}: the caption is empty; write one")
            continue
        caption = None if text is None else " ".join(text.split())
        kinds = {"category": " ".join(category.split()), "subcategory": " ".join(subcategory.split())}
        if isinstance(image, bytes) and image:
            yield Record(image=image, name=where.rpartition(" ")[2], text=caption, where=where, **kinds)
        elif isinstance(image, str) and image.strip():
            path = _inside(root, image, where)
            if path.is_file():
                name = path.relative_to(root).as_posix()
                yield Record(image=path, name=name, text=caption, where=where, **kinds)
            else:
                bad.add("missing image", f"{where}: no image at {path}; put it there, mend the path")
        else:
            bad.add("missing image", f"{where}: there is no image; give one")
    if file.suffix == ".jsonl":
        yield from _unlabelled(root)


def _unlabelled(root: Path) -> Iterator[Record]:
    """Yield every picture under ``unlabelled``; a link is followed no further than a line's would be.

    Hidden files, such as a Mac leaves beside each picture, are none of them.
    """
    for path in sorted((root / UNLABELLED_FOLDER).rglob("*")):
        place = path.relative_to(root)
        if any(part.startswith(".") for part in place.parts):
            continue
        name = place.as_posix()
        if path.suffix.lower() in PICTURES and path.is_file():
            yield Record(image=_inside(root, name, name), name=name, text=None, where=name)


def _inside(root: Path, image: str, where: str) -> Path:
    """Resolve an image path; links count as where they lead."""
    try:
        path = (root / image).resolve()
    except (ValueError, RuntimeError) as error:  # a zero byte; a loop of links
        raise UserError(f"{where}: {image!r} is no path: {error}; mend it") from error
    if PurePath(image).is_absolute() or not path.is_relative_to(root):
        raise UserError(f"{where}: {image!r} climbs out of {root}; use a path inside that folder")
    return path


def _jsonl_rows(file: Path, bad: BadRecords) -> Iterator[tuple[str, str, str | None, str, str]]:
    decoder = msgspec.json.Decoder(_Line)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                parsed = decoder.decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                bad.add("broken line", f'{where}: {error}; write {{"image": path, "text": caption}}')
                continue
            yield where, parsed.image, parsed.text, _kind(parsed.category), _kind(parsed.subcategory)


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any, Any, str, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file} needs pyarrow; pip install 'edgeglm[build]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if missing := [name for name in ("image", "text") if name not in columns]:
            raise UserError(
                f"{file} has no column {missing[0]!r}, only {', '.join(columns) or 'none'}; "
                "rename the columns to image and text"
            )
        number = 0
        kinds = [name for name in ("category", "subcategory") if name in columns]
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=["image", "text", *kinds]):
            for row in batch.to_pylist():
                image = row["image"]
                if isinstance(image, dict):  # as the datasets library writes images
                    image = image.get("bytes") or image.get("path")
                category, subcategory = (_kind(row.get(name)) for name in ("category", "subcategory"))
                yield f"{file} row {number}", image, row["text"], category, subcategory
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a whole Parquet file: {error}; write it again") from error


def _kind(value: Any) -> str:
    """Return a category as text. Zero is the first of a numbered list; what is no number is none."""
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
