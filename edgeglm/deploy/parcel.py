"""What travels: files by digest, with the bundle's own list of them first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgeglm.bundle.manifest import MANIFEST_NAME, SIGNATURES_NAME, Manifest
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.trust import Trust
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A verified bundle, ready to be sent.

    Attributes:
        path: The bundle that was named.
        bundle: It, opened and verified.
        manifest_bytes: As it lies there; its digest names the bundle as a whole.
        objects: ``{sha256: file}`` of all files but the manifest.
        beside: ``{name: sha256}`` of what lies beside the manifest and is not in it.
        reference: ``{name: sha256}`` of the reference set, if there is one.
    """

    path: Path
    bundle: Bundle
    manifest_bytes: bytes
    objects: Mapping[str, Path]
    beside: Mapping[str, str] = field(default_factory=dict)
    reference: Mapping[str, str] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def manifest_sha256(self) -> str:
        """The digest of the manifest's bytes."""
        return sha256_bytes(self.manifest_bytes)

    @property
    def size(self) -> int:
        """Bytes of the whole bundle."""
        return self.manifest.size + len(self.manifest_bytes)


@contextmanager
def opened_parcel(path: Path, *, reference: Path | None = None) -> Iterator[Parcel]:
    """Verify a bundle and yield it for sending; an archive lies in a temporary folder meanwhile.

    Whether its signature counts is the device's to say. Raises UserError as ``open_bundle`` does.
    """
    with open_bundle(path, trust=Trust(allow_unsigned=True, allow_downgrade=True)) as bundle:
        objects = {record.sha256: bundle.file(name) for name, record in bundle.manifest.files.items()}
        beside = {}
        signatures = bundle.path / SIGNATURES_NAME
        if signatures.is_file():
            beside[SIGNATURES_NAME] = sha256_file(signatures)
            objects[beside[SIGNATURES_NAME]] = signatures
        travelling = _reference_files(reference) if reference is not None else {}
        objects.update(travelling.values())
        yield Parcel(
            path=path,
            bundle=bundle,
            manifest_bytes=(bundle.path / MANIFEST_NAME).read_bytes(),
            objects=objects,
            beside=beside,
            reference={name: digest for name, (digest, _) in travelling.items()},
        )


def _reference_files(folder: Path) -> dict[str, tuple[str, Path]]:
    """Return ``{name: (sha256, file)}`` of a reference set. Raises UserError."""
    from edgeglm.deploy.reference import PAIRS_NAME, read_pairs

    names = {PAIRS_NAME, *(pair.image for pair in read_pairs(folder))}
    found = {}
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"the reference {folder} names {name}, which is not there; add it or drop its line"
            )
        found[name] = (sha256_file(path), path)
    return found
