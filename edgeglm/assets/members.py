"""Inner files of a fetched asset, read without unpacking the rest."""

from __future__ import annotations

import os
import shutil
import tarfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import UserError

_ARCHIVES = (".whl", ".zip", ".tgz", ".tar.gz")
_SHOWN = 5  # names in a message


def asset_member(artifact: Artifact, inner: str) -> bytes:
    """Return one inner file of an asset.

    Args:
        artifact: What ``fetch_asset`` returned: one archive file, or a folder of files.
        inner: Posix path inside it, such as ``package/icons.json``.

    Raises:
        UserError: There is no such file, the path climbs out, or the archive is damaged.
    """
    with _opened(artifact, inner) as file:
        return file.read()


def member_head(artifact: Artifact, inner: str, count: int) -> bytes:
    """Return the first ``count`` bytes of one inner file; fewer where it is shorter. As ``asset_member``."""
    with _opened(artifact, inner) as file:
        return file.read(count)


def extract_member_to(artifact: Artifact, inner: str, destination: Path) -> Path:
    """Copy one inner file to ``destination`` in constant memory and return ``destination``.

    The file appears whole or not at all. Raises UserError as ``asset_member`` does.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{uuid.uuid4().hex}")
    try:
        with _opened(artifact, inner) as source, partial.open("xb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
    return destination


def member_names(artifact: Artifact) -> list[str]:
    """Return the posix paths of all inner files, sorted."""
    archive = _archive_of(artifact)
    if archive is None:
        return sorted(artifact.files)
    with _damage_explained(archive):
        if archive.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(archive) as file:
                return sorted(info.filename for info in file.infolist() if not info.is_dir())
        with tarfile.open(archive, "r:gz") as tar:
            return sorted(member.name for member in tar if member.isfile())


def _archive_of(artifact: Artifact) -> Path | None:
    if len(artifact.files) == 1:
        (name,) = artifact.files
        if name.endswith(_ARCHIVES):
            return artifact.path / name
    return None


@contextmanager
def _opened(artifact: Artifact, inner: str) -> Iterator[IO[bytes]]:
    path = PurePosixPath(inner)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{inner!r} climbs out of the asset; give a path inside it")
    archive = _archive_of(artifact)
    if archive is None:
        if path.as_posix() not in artifact.files:
            raise _missing(artifact, inner)
        with (artifact.path / path).open("rb") as plain:
            yield plain
        return
    with _damage_explained(archive):
        if archive.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(archive) as file:
                try:
                    info = file.getinfo(inner)
                except KeyError:
                    raise _missing(artifact, inner) from None
                with file.open(info) as stream:
                    yield stream
            return
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:  # in file order: stops at the member, and never seeks back
                if member.name == inner and member.isfile():
                    stream_or_none = tar.extractfile(member)
                    assert stream_or_none is not None
                    yield stream_or_none
                    return
            raise _missing(artifact, inner)


@contextmanager
def _damage_explained(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{os.fspath(archive)} is not a whole archive: {error}; remove it and fetch it again"
        ) from error


def _missing(artifact: Artifact, inner: str) -> UserError:
    names = member_names(artifact)
    near = [name for name in names if PurePosixPath(name).name == PurePosixPath(inner).name]
    some = ", ".join(map(repr, names[:_SHOWN]))
    hint = f"choose one of its {len(names)} files, such as {some}" if names else "choose an asset that has it"
    if near:
        hint = f"did you mean {near[0]!r}?"
    return UserError(f"the asset at {artifact.path} has no file {inner!r}; {hint}")
