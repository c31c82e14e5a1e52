"""Finished engines that a bundle finds again: of its own slot, where a run was cut or staged, and of others.

``edgeglm finalize`` finds an engine by the name of its folder, which is the digest of all that decides it,
and sweeps what it does not use. An engine of a file that the new bundle does not hold can only lend its
timing cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from edgeglm.deploy.device.layout import Layout, read_json
from edgeglm.deploy.device.objects import inside, linked, object_path, remove_tree

ENGINES = Path("bundle.finalized/engines")


def cleared(folder: Path, digests: Collection[str]) -> None:
    """Empty a slot but for finished engines of files with these digests; its record goes first."""
    (folder / "slot.json").unlink(missing_ok=True)
    _remove_all(folder, but=ENGINES.parts[0])
    _remove_all(folder / ENGINES.parent, but=ENGINES.name)
    for engine in _folders(folder / ENGINES):
        if engine.name.startswith(".") or not _fits(engine, digests):
            remove_tree(engine)


def brought(layout: Layout, folder: Path, digests: Collection[str], sent: Mapping[str, str]) -> None:
    """Bring engines into a slot: the running slot's, those of the former that fit, and what was sent.

    ``sent`` is ``{name below engines/: sha256}``. What lies nearer goes before: what was sent is of another
    board.
    """
    for link in ("current", "previous"):
        slot = layout.pointed(link)
        for engine in _folders(layout.slots / slot / ENGINES) if slot is not None else ():
            place = folder / ENGINES / engine.name
            if (
                place.exists()
                or engine.name.startswith(".")
                or (link != "current" and not _fits(engine, digests))
            ):
                continue
            for path in sorted(engine.rglob("*")):
                if path.is_file():
                    linked(path, place / path.relative_to(engine))
    there = {engine.name for engine in _folders(folder / ENGINES)}
    for name, digest in sent.items():
        if Path(inside(name)).parts[0] not in there:
            linked(object_path(layout, digest), folder / ENGINES / name)


def has_timing_caches(layout: Layout) -> bool:
    """Say whether the running slot's engines were built by what keeps timing caches."""
    slot = layout.pointed("current")
    return slot is not None and any((layout.slots / slot / ENGINES).glob("*/timing.cache"))


def _fits(engine: Path, digests: Collection[str]) -> bool:
    return read_json(engine / "engine.json").get("onnx_sha256") in digests


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


def _remove_all(folder: Path, *, but: str) -> None:
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif path.name != but:
            shutil.rmtree(path)
