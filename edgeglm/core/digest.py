"""sha256 of bytes, files and JSON-like values. Digests are never truncated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def sha256_bytes(data: bytes) -> str:
    """Return the hex sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's content, read in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        # To clear a megabyte takes longer than to hash a small file; one byte more ends it in two reads.
        size = os.fstat(file.fileno()).st_size
        view = memoryview(bytearray(min(_CHUNK_BYTES, size + 1)))
        while count := file.readinto(view):
            digest.update(view[:count])
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """Serialise ``value`` to the one JSON form that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_json(value: Any) -> str:
    """Return the hex sha256 of the canonical JSON of ``value``."""
    return sha256_bytes(canonical_json(value))


def sha256_listing(files: Mapping[str, str]) -> str:
    """Return one digest for a set of files given as ``{relative posix path: sha256}``."""
    return sha256_json(dict(files))
