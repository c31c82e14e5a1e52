"""What an index writes of itself: its header, its rows, and the two kinds of log records."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from edgeglm.bundle.manifest import Sha256
from edgeglm.core.errors import UserError

SCHEMA = 1
HEADER_NAME = "index.json"
CURRENT_NAME = "CURRENT"
ADDED, REMOVED = 1, 2

Count = Annotated[int, msgspec.Meta(ge=0)]


class IndexHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``index.json``: written once, when the index is made.

    Attributes:
        schema_version: Of the files' layout.
        space: Fingerprint of the embedding space that all rows are of.
        dimensions: Of an embedding.
        bundle: Name of the bundle that embedded the first rows, with its digest, target and variant.
        model: sha256 of the image tower that embedded them.
        precision: Which codes a search scans unless told otherwise.
        thumbnail_side: Longest side of the kept pictures in pixels; 0 where none are kept.
        created: ISO date. edgeglm: The version that made it.
    """

    schema_version: Annotated[int, msgspec.Meta(ge=1, le=SCHEMA)] = SCHEMA
    space: Sha256
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    bundle: str = ""
    content_digest: str = ""
    target: str = ""
    variant: str = ""
    model: str = ""
    precision: Annotated[str, msgspec.Meta(pattern="^(int8|binary|exact)$")] = "int8"
    thumbnail_side: Count = 0
    created: str = ""
    edgeglm: str = ""


class GenerationManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``manifest.json`` of a generation.

    ``scale`` is that of its int8 codes; ``files`` is ``{name: (sha256, bytes)}`` of all but the log.
    """

    schema_version: Annotated[int, msgspec.Meta(ge=1, le=SCHEMA)] = SCHEMA
    rows: Count
    next_sequence: Count
    scale: Annotated[float, msgspec.Meta(gt=0)]
    files: dict[str, tuple[Sha256, Count]]


class StoredRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row of a generation. ``picture`` is (first byte, bytes) in ``thumbnails.bin``; no bytes for none."""

    sequence: int
    id: str
    stamp: str
    metadata: msgspec.Raw
    picture: tuple[int, int]


class AddedRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row of a log record; its picture of ``picture_bytes`` follows those of the rows before it."""

    id: str
    stamp: str
    metadata: msgspec.Raw
    picture_bytes: int


class Added(msgspec.Struct, frozen=True, array_like=True):
    """Head of an ADDED record. The blob is float16 [N, D], then the pictures. A known id is replaced."""

    first_sequence: int
    rows: tuple[AddedRow, ...]


class Removed(msgspec.Struct, frozen=True, array_like=True):
    """Head of a REMOVED record."""

    ids: tuple[str, ...]


def header_from_bytes(data: bytes, origin: str) -> IndexHeader:
    """Parse ``index.json``. Raises UserError for another schema or a file that is something else."""
    try:
        found = msgspec.json.decode(data, type=_Version).schema_version
        if found > SCHEMA:
            raise UserError(
                f"{origin}: index schema {found} is newer than this edgeglm understands ({SCHEMA}); "
                "upgrade edgeglm"
            )
        return msgspec.json.decode(data, type=IndexHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{origin} is no index header: {error}; give an index's folder") from error


def metadata_of(raw: msgspec.Raw) -> dict[str, Any]:
    """Decode the metadata of a row."""
    return msgspec.msgpack.decode(raw, type=dict[str, Any])


class _Version(msgspec.Struct):
    schema_version: int
