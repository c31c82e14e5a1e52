"""Engines on the device: found by their build signature, or built and put in place in one step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from edgeglm.bundle.atomic import disk_errors, put_in_place, staging_folder
from edgeglm.bundle.manifest import VariantRecord
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.receipt import (
    BUILD_LOG,
    ENGINE_PLAN,
    ENGINE_RECORD,
    LAYER_TABLE,
    TIMING_CACHE,
    EngineUse,
)
from edgeglm.compile.builder import EnginePlan
from edgeglm.compile.contract import precision_of, tower_profiles
from edgeglm.compile.route import Route
from edgeglm.compile.worker import BuildRequest
from edgeglm.core.digest import sha256_file, sha256_json
from edgeglm.core.durable import sync_path
from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress
from edgeglm.engines.board import Board
from edgeglm.engines.plan import PlanMetadata, ShapeRange, plan_metadata_from_file
from edgeglm.targets.build_options import BuildOptions, Range

_CODE = 3
"""Raised when the builder makes something else of the same request."""

_SHELL_DIGEST = "engine.sha256"

BuildEngine = Callable[[BuildRequest, Progress], EnginePlan]


@dataclass(frozen=True, kw_only=True)
class DeviceEngine:
    """One engine that lies finished in ``folder``."""

    folder: Path
    metadata: PlanMetadata
    use: EngineUse

    @property
    def plan(self) -> Path:
        """The raw plan."""
        return self.folder / ENGINE_PLAN


def device_engines(
    bundle: Bundle,
    variant: VariantRecord,
    *,
    board: Board,
    route: Route,
    folder: Path,
    build: BuildEngine,
    progress: Progress,
) -> dict[str, DeviceEngine]:
    """Return the engine of each tower of a variant, built where none with its signature is there.

    Args:
        bundle: The opened bundle; its own plans are taken where they are for this very machine.
        variant: Whose towers.
        board: This machine.
        route: Who builds.
        folder: Where engines are kept, one folder a signature.
        build: Builds one engine.
        progress: Where the build is shown.

    Raises:
        UserError, EdgeglmError: as the builder does; the disk is full.
    """
    assert route.library != "onnxruntime"
    assert route.member is not None
    longest = bundle.preprocessing.text.max_length
    length: Range = (1, max(1, longest // 2), longest)
    engines = {}
    options = route.member.engine or BuildOptions()
    for tower, name in variant.files.items():
        request = BuildRequest(
            onnx_path=str(bundle.file(name)),
            targets=(route.member,),
            library=route.library,
            precision=precision_of(variant.name),
            profiles=tower_profiles(tower, options.batch, length, options.buckets),
            options=options,
            variant=variant.name,
            tower=tower,
            timing_cache=_timing_cache(folder, route.version, bundle.manifest.files[name].sha256)
            if route.library == "tensorrt"
            else None,
        )
        onnx = bundle.manifest.files[name].sha256
        signature = build_signature(request, onnx_sha256=onnx, board=board, version=route.version)
        place = folder / signature
        engine = _kept(place, signature, onnx) or _carried(
            bundle, route, board, place, signature, onnx, request
        )
        if engine is None:
            built = build(request, progress)
            _put(place, partial(_write, built=built))
            engine = _kept(place, signature, onnx, reused=False)
            assert engine is not None, "it was written a moment ago"
        engines[tower] = engine
    return engines


def build_signature(request: BuildRequest, *, onnx_sha256: str, board: Board, version: str) -> str:
    """Return the digest of everything that decides what the builder makes on this board.

    The variant's name and precision do not: networks are strongly typed, so two variants that share a file
    (a tower whose INT8 did not pay) share its engine.
    """
    parts = {
        "code": _CODE,
        "onnx": onnx_sha256,
        "library": [request.library, version],
        "board": {**board.identity, "l4t": board.l4t},
        "profiles": msgspec.to_builtins(request.profiles),
        "options": msgspec.to_builtins(request.options),
    }
    return sha256_json(parts)


def sweep(folder: Path, keep: Mapping[str, object]) -> None:
    """Remove the engines that no receipt names any more; those of ``finalize.sh`` are its own."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name not in keep and not (entry / _SHELL_DIGEST).is_file():
                shutil.rmtree(entry, ignore_errors=True)


def _kept(place: Path, signature: str, onnx: str, *, reused: bool = True) -> DeviceEngine | None:
    """Return the engine at ``place``; one that is damaged or not what it says is none."""
    try:
        metadata = plan_metadata_from_file(place / ENGINE_RECORD)
        digest = sha256_file(place / ENGINE_PLAN)
    except (UserError, OSError):
        return None
    if digest != metadata.plan_sha256 or metadata.onnx_sha256 != onnx:
        return None
    use = EngineUse(signature=signature, plan_sha256=digest, seconds=metadata.seconds, reused=reused)
    return DeviceEngine(folder=place, metadata=metadata, use=use)


def _carried(
    bundle: Bundle,
    route: Route,
    board: Board,
    place: Path,
    signature: str,
    onnx: str,
    request: BuildRequest,
) -> DeviceEngine | None:
    """Take a plan that the bundle brought, if it is for this library, version and GPU, and large enough."""
    options = request.options
    for name in bundle.names("engines"):
        record = name.removesuffix(".plan") + ".json"
        if not name.endswith(".plan") or record not in bundle.manifest.files:
            continue
        metadata = bundle.parsed(record, PlanMetadata)
        mine = metadata.library == route.library and metadata.library_version == route.version
        mine = mine and metadata.options == dict.fromkeys(options.chosen, True)
        largest = max((_batch_of(profile) for profile in metadata.profiles), default=0)
        if (
            mine
            and board.sm in metadata.sms
            and metadata.onnx_sha256 == onnx
            and largest >= options.largest_batch
            and len(metadata.profiles) + len(metadata.buckets) >= len(request.profiles)
        ):
            log = name.removesuffix(".plan") + ".log"
            parts = {ENGINE_PLAN: bundle.file(name), ENGINE_RECORD: bundle.file(record)}
            if log in bundle.manifest.files:
                parts[BUILD_LOG] = bundle.file(log)

            def copy(staged: Path, parts: Mapping[str, Path] = parts) -> None:
                for part, source in parts.items():
                    shutil.copyfile(source, staged / part)

            _put(place, copy)
            return _kept(place, signature, onnx)
    return None


def _batch_of(profile: Mapping[str, ShapeRange]) -> int:
    return min((shapes.max[0] for shapes in profile.values()), default=0)


def _write(staged: Path, built: EnginePlan) -> None:
    (staged / ENGINE_PLAN).write_bytes(built.plan)
    (staged / ENGINE_RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(built.metadata), indent=1))
    (staged / BUILD_LOG).write_text("\n".join(built.log) + "\n", "utf-8")
    if built.timing_cache is not None:
        (staged / TIMING_CACHE).write_bytes(built.timing_cache)
    if built.layers is not None:
        (staged / LAYER_TABLE).write_text(built.layers, "utf-8")


def _timing_cache(folder: Path, version: str, onnx: str) -> str | None:
    """Return a timing cache that this very version left here: of this very file, else the largest."""
    found = []
    for cache in folder.glob(f"*/{TIMING_CACHE}"):
        try:
            metadata = plan_metadata_from_file(cache.with_name(ENGINE_RECORD))
        except UserError:
            continue
        if metadata.library_version == version:
            found.append((metadata.onnx_sha256 == onnx, cache.stat().st_size, str(cache)))
    return max(found)[2] if found else None


def _put(place: Path, fill: Callable[[Path], None]) -> None:
    with disk_errors(place), staging_folder(place) as staging:
        new = staging / "engine"
        new.mkdir()
        fill(new)
        for path in (*new.iterdir(), new):  # the receipt, which is synced, says that they are there
            sync_path(path)
        put_in_place(new, place)
