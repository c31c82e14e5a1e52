"""Open a bundle: check names, sizes and digests before anything in it is deserialised."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edgeglm.bundle.atomic import disk_errors, put_in_place, staging_folder
from edgeglm.bundle.extract import DEFAULT_LIMITS, Limits, altered, extract_archive, is_archive
from edgeglm.bundle.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURES_NAME,
    FileRecord,
    Manifest,
    manifest_from_bytes,
)
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.paths import inside
from edgeglm.bundle.signing import MAX_SIGNATURES_BYTES
from edgeglm.bundle.temporary import remove_temporary, temporary_folder
from edgeglm.bundle.trust import SignatureState, Trust, check_age, check_signatures, trust_here
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError

_THREADS = 2
_LARGE_BYTES, _SMALL_FILES = 1 << 20, 64
_REMEDY = "the bundle is damaged or was altered, get it again"


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What ``edgeglm verify`` says of an intact bundle. ``size`` is in bytes."""

    path: Path
    name: str
    files: int
    size: int
    seconds: float
    content_digest: str
    signature: str


def open_bundle(
    path: Path,
    *,
    verify: bool = True,
    extract_to: Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    threads: int = _THREADS,
    trust: Trust | None = None,
) -> Bundle:
    """Open a bundle folder, ``.tar.zst`` or ``.zip``.

    Args:
        path: What to open. The content decides what it is, not the name.
        verify: Whether to hash a folder's files; an archive is always verified as it is extracted.
        extract_to: Where an archive goes, a folder that is not there yet; a temporary one, which
            ``Bundle.close`` removes, by default.
        limits: What an archive may grow to.
        threads: Threads that hash.
        trust: Whose signatures count; what this machine's trust folder says for None.

    Raises:
        UserError: no trusted signature where one is asked for, a replay, truncated, altered, from a
            newer schema, unsafe names, a zip bomb, extra or missing files. The message names the file
            and both digests. Nothing is left on disk.
    """
    if not path.exists():
        raise UserError(f"there is no bundle at {path}; give the path of a bundle folder or archive")
    trust = trust_here() if trust is None else trust
    if path.is_dir():
        manifest, state = _folder_manifest(path, trust)
        if verify:
            _verify_folder(path, manifest, threads)
        return Bundle(path=path, origin=path, manifest=manifest, verified=verify, signature=state)
    if not path.is_file() or not is_archive(path):
        raise UserError(f"{path} is no bundle; give a bundle folder, .tar.zst or .zip")
    if extract_to is None:
        return _extracted_temporarily(path, limits, trust)
    if extract_to.exists():
        raise UserError(f"cannot extract to {extract_to}: it is there already; choose a new folder")
    with disk_errors(extract_to), staging_folder(extract_to) as staging:
        (staging / "bundle").mkdir()
        manifest, state = extract_archive(path, staging / "bundle", limits=limits, trust=trust)
        put_in_place(staging / "bundle", extract_to)
    return Bundle(path=extract_to, origin=path, manifest=manifest, verified=True, signature=state)


def verify_report(
    path: Path, *, limits: Limits = DEFAULT_LIMITS, threads: int = _THREADS, trust: Trust | None = None
) -> VerifyResult:
    """Verify every byte of a bundle and say what was read. Raises UserError as ``open_bundle`` does."""
    started = time.perf_counter()
    with open_bundle(path, limits=limits, threads=threads, trust=trust) as bundle:
        manifest = bundle.manifest
    return VerifyResult(
        path=path,
        name=manifest.name,
        files=len(manifest.files),
        size=manifest.size,
        seconds=time.perf_counter() - started,
        content_digest=manifest.content_digest,
        signature=bundle.signature.words,
    )


def _extracted_temporarily(archive: Path, limits: Limits, trust: Trust) -> Bundle:
    folder = temporary_folder()
    try:
        manifest, state = extract_archive(archive, folder, limits=limits, trust=trust)
    except BaseException:
        remove_temporary(folder)
        raise
    return Bundle(
        path=folder, origin=archive, manifest=manifest, verified=True, signature=state, temporary=folder
    )


def _folder_manifest(folder: Path, trust: Trust) -> tuple[Manifest, SignatureState]:
    """Read both files raw, hold one against the other, and only then parse the manifest."""
    data = _small_file(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    if data is None:
        raise UserError(f"{folder} has no {MANIFEST_NAME}, so it is no bundle; give the path of a bundle")
    signatures = _small_file(folder / SIGNATURES_NAME, MAX_SIGNATURES_BYTES)
    state = check_signatures(trust, data, signatures, str(folder))
    manifest = manifest_from_bytes(data, str(folder / MANIFEST_NAME))
    check_age(trust, manifest, str(folder))
    return manifest, state


def _small_file(path: Path, limit: int) -> bytes | None:
    if path.is_symlink() or not path.is_file():
        return None
    try:
        if path.stat().st_size > limit:
            raise UserError(f"{path} is larger than {limit} bytes; {_REMEDY}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from error


def _verify_folder(folder: Path, manifest: Manifest, threads: int) -> None:
    present = set()
    for name, size in _files_below(folder):
        if name in (MANIFEST_NAME, SIGNATURES_NAME):
            continue
        record = manifest.files.get(name)
        if record is None:
            raise UserError(f"{folder} holds {name!r}, which is not in its manifest; remove it or {_REMEDY}")
        if size != record.size:
            raise UserError(f"{folder}: {name} has {size} bytes, the manifest says {record.size}; {_REMEDY}")
        present.add(name)
    if missing := manifest.files.keys() - present:
        raise UserError(f"{folder} lacks {min(missing)}, which its manifest lists; {_REMEDY}")

    def check(items: Sequence[tuple[str, FileRecord]]) -> None:
        for name, record in items:
            try:
                actual = sha256_file(inside(folder, name))
            except OSError as error:
                raise UserError(f"cannot read {folder / name}: {error.strerror}; make it readable") from error
            if actual != record.sha256:
                raise altered(str(folder), name, record.sha256, actual)

    largest_first = sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0]))
    # A large file is a task of its own; of small ones a task would take longer than the hashing.
    large = sum(record.size > _LARGE_BYTES for _, record in largest_first)
    tasks = [[one] for one in largest_first[:large]]
    tasks += [
        largest_first[start : start + _SMALL_FILES]
        for start in range(large, len(largest_first), _SMALL_FILES)
    ]
    with ThreadPoolExecutor(threads, thread_name_prefix="edgeglm-verify") as pool:
        for _ in pool.map(check, tasks):
            pass


def _files_below(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield (relative posix path, bytes) of each plain file; anything else is refused."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(folder / below) as found:
                entries = list(found)
        except OSError as error:
            raise UserError(
                f"cannot look into {folder / below}: {error.strerror}; make it readable"
            ) from error
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(name)
            elif entry.is_file(follow_symlinks=False):
                yield name, entry.stat(follow_symlinks=False).st_size
            else:
                raise UserError(f"{folder} holds {name!r}, which is a link or a device; {_REMEDY}")
