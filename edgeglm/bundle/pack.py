"""Write a bundle: all of it or nothing, and never over something that is not a bundle."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import msgspec

from edgeglm.bundle.archive import ArchiveKind, archive_from_folder
from edgeglm.bundle.atomic import disk_errors, put_in_place, staging_folder
from edgeglm.bundle.bom import BOM_NAME, bom_bytes
from edgeglm.bundle.extract import archive_manifest
from edgeglm.bundle.fingerprint import space_record
from edgeglm.bundle.manifest import MANIFEST_NAME, FileRecord, Manifest, content_digest, manifest_bytes
from edgeglm.bundle.paths import inside
from edgeglm.core.durable import sync_path
from edgeglm.core.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CHUNK_BYTES = 1 << 20


def write_bundle(
    destination: Path,
    *,
    sources: Mapping[str, Path | bytes],
    manifest: Manifest,
    archive: ArchiveKind = "none",
) -> Path:
    """Write the folder ``destination`` and, if asked, one archive of it beside it.

    Args:
        destination: The bundle folder. An older bundle there is replaced in one step.
        sources: ``{relative posix path: file to copy, or its content}``, without the manifest. A bill
            of materials, ``bom.cdx.json``, is made of the manifest unless it is among them.
        manifest: Everything but ``files`` and ``content_digest``, which are filled in here.
        archive: "none", or which archive to write too; ``archive_path`` tells where.

    Returns:
        ``destination``.

    Raises:
        UserError: the destination is something else than a bundle, the disk is full or read-only.
            Nothing is left half-written, and an older bundle is untouched.
        ValueError: the manifest does not fit the sources, or ``recipe.toml`` holds an absolute path.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - resolve() would follow a link
    packed = archive_path(destination, archive)
    _refuse_to_overwrite(destination, packed)
    if "recipe.toml" in sources:
        _refuse_absolute_paths("recipe.toml", sources["recipe.toml"])
    with disk_errors(destination), staging_folder(destination) as staging:
        folder = staging / "bundle"
        folder.mkdir()
        files = {name: _copied(sources[name], folder, name) for name in sorted(sources)}
        _refuse_absent(manifest, files)
        if BOM_NAME not in files:
            files[BOM_NAME] = _copied(bom_bytes(manifest, files), folder, BOM_NAME)
        whole = msgspec.structs.replace(
            manifest,
            files=files,
            content_digest=content_digest(files),
            space=space_record(files, manifest.variants, manifest.space),
        )
        _copied(manifest_bytes(whole), folder, MANIFEST_NAME)
        for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
            sync_path(path)
        if packed is not None:
            archive_from_folder(folder, files, staging / "archive", archive)
        put_in_place(folder, destination)
        if packed is not None:
            put_in_place(staging / "archive", packed)
    return destination


def require_free(destination: Path, archive: ArchiveKind = "none") -> None:
    """Raise UserError if something that is no bundle lies where one is to go: asked before long work."""
    _refuse_to_overwrite(destination, archive_path(destination, archive))


def archive_path(destination: Path, archive: ArchiveKind) -> Path | None:
    """Return where ``write_bundle`` puts the archive, or None if there is to be none."""
    return None if archive == "none" else destination.with_name(f"{destination.name}.{archive}")


def absolute_paths_in(toml: str) -> list[str]:
    """List the string values of a TOML text that are absolute paths: they differ between folders."""
    return [value for value in _strings(tomllib.loads(toml)) if _is_absolute(value)]


def _refuse_to_overwrite(destination: Path, packed: Path | None) -> None:
    remedy = "choose another place for the bundle, or remove that yourself"
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise UserError(f"{destination} is there and is not a bundle; {remedy}")
    try:
        if destination.is_dir() and any(destination.iterdir()) and not _looks_like_bundle(destination):
            raise UserError(f"the folder {destination} holds something that is not a bundle; {remedy}")
    except OSError as error:
        raise UserError(f"cannot look into {destination}: {error.strerror}; {remedy}") from error
    if packed is not None and packed.exists():
        try:
            archive_manifest(packed)
        except UserError as error:
            raise UserError(f"{packed} is there and is not a bundle; {remedy}") from error


def _refuse_absent(manifest: Manifest, files: Mapping[str, FileRecord]) -> None:
    for variant in manifest.variants:
        for tower, name in variant.files.items():
            if name not in files or tower not in manifest.towers:
                raise ValueError(
                    f"variant {variant.name!r} names {name!r} for tower {tower!r}, "
                    "which the manifest does not list"
                )


def _looks_like_bundle(folder: Path) -> bool:
    """A damaged or newer bundle is still a bundle, so only the two telling keys are asked for."""
    try:
        found = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"schema_version", "content_digest"} <= found.keys()


def _copied(source: Path | bytes, folder: Path, name: str) -> FileRecord:
    path = inside(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as out:
        for chunk in _content(source):
            digest.update(chunk)
            out.write(chunk)
            size += len(chunk)
        out.flush()
        os.fsync(out.fileno())
    return FileRecord(sha256=digest.hexdigest(), size=size)


def _content(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    try:
        file = source.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}; build it again") from error
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _refuse_absolute_paths(name: str, source: Path | bytes) -> None:
    text = b"".join(_content(source)).decode()
    if found := absolute_paths_in(text):
        raise ValueError(f"{name} holds absolute paths, and the content digest would depend on them: {found}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from _strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child)


def _is_absolute(value: str) -> bool:
    return PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
