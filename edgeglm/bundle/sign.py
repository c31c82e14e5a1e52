"""Sign a bundle, folder or archive: after every byte of it was verified, and in one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeglm.bundle.archive import ArchiveKind, archive_from_folder
from edgeglm.bundle.atomic import disk_errors, put_in_place, staging_folder
from edgeglm.bundle.extract import is_zip
from edgeglm.bundle.manifest import MANIFEST_NAME, SIGNATURES_NAME
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.signing import Signature, signature_of, signatures_bytes, signatures_from_bytes
from edgeglm.bundle.trust import Trust
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError


def sign_bundle(path: Path, keys: Sequence[Path], *, replace: bool = False) -> tuple[Signature, ...]:
    """Add the signatures of ``keys`` to a bundle and return all that it then carries.

    Args:
        path: A bundle folder or archive.
        keys: ``.key`` files.
        replace: Drop the signatures that are there.

    Raises:
        UserError: the bundle is damaged, a present signature does not fit, a key cannot be read. The
            bundle is then as it was.
    """
    if not keys:
        raise UserError("no key to sign with; give at least one .key file")
    path = path.resolve()  # or a link would be replaced, and what it names stay unsigned
    with open_bundle(path, trust=Trust(allow_unsigned=True)) as bundle:
        manifest = (bundle.path / MANIFEST_NAME).read_bytes()
        kept = () if replace else _present(bundle)
        content = signatures_bytes([*kept, *(signature_of(manifest, key) for key in keys)])
        signatures = signatures_from_bytes(content, str(path)).signatures  # before anything is written
        with disk_errors(path), staging_folder(path) as staging:
            new = staging / SIGNATURES_NAME
            new.write_bytes(content)
            if bundle.temporary is None:
                put_in_place(new, path / SIGNATURES_NAME)
            else:
                new.replace(bundle.path / SIGNATURES_NAME)
                kind: ArchiveKind = "zip" if is_zip(path) else "tar.zst"
                archive_from_folder(bundle.path, bundle.manifest.files, staging / "archive", kind)
                put_in_place(staging / "archive", path)
    return signatures


def _present(bundle: Bundle) -> tuple[Signature, ...]:
    path = bundle.path / SIGNATURES_NAME
    return signatures_from_bytes(path.read_bytes(), str(path)).signatures if path.is_file() else ()
