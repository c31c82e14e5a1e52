"""The receipt of ``edgeglm finalize``: what one board built, tested, timed and chose.

It lies beside the bundle and not in it, in ``<bundle>.finalized/``, because the bundle is what its
maker vouches for and the receipt is what one board says. It is written last, in one step, so that
its presence means that the work was finished.

    <bundle>.finalized/receipt.json
    <bundle>.finalized/engines/<signature>/engine.plan, engine.json, build.log, and where the builder
        gives them timing.cache and layers.json
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgeglm.bundle.atomic import disk_errors
from edgeglm.bundle.manifest import Sha256
from edgeglm.bundle.opened import Bundle
from edgeglm.core.digest import sha256_file
from edgeglm.core.durable import sync_path
from edgeglm.core.errors import UserError
from edgeglm.engines.board import Board, Conditions
from edgeglm.engines.plan import plan_metadata_from_file
from edgeglm.engines.power import Energy

RECEIPT_NAME = "receipt.json"
RECEIPT_SCHEMA = 1
_MAX_RECEIPT_BYTES = 4 << 20

ENGINE_PLAN, ENGINE_RECORD, BUILD_LOG = "engine.plan", "engine.json", "build.log"
TIMING_CACHE, LAYER_TABLE = "timing.cache", "layers.json"

Library = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
Evidence = Literal["real device", "real GPU", "ONNX Runtime"]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all receipt records: immutable, every key known."""


class EngineUse(_Record, frozen=True, kw_only=True):
    """The engine of one tower.

    Attributes:
        signature: Digest of everything that decides what the builder makes; the folder's name.
        plan_sha256: Digest of the plan.
        seconds: Time of the build.
        reused: Whether an earlier build with this signature was found.
    """

    signature: Sha256
    plan_sha256: Sha256
    seconds: float
    reused: bool


class SelfTest(_Record, frozen=True, kw_only=True):
    """How near the golden inputs came here to what they gave where the bundle was made."""

    passed: bool
    images: int
    texts: int
    image_cosine_min: float
    text_cosine_min: float
    top_k: int
    top_k_agreement: float


class CandidateRecord(_Record, frozen=True, kw_only=True):
    """What became of one variant.

    ``status``: "chosen"; "passed", but slower; "failed" to build or its self-test; "left out" of the
    way that was taken here.
    """

    variant: str
    status: Literal["chosen", "passed", "failed", "left out"]
    reason: str
    selftest: SelfTest | None = None
    latency_ms: dict[str, float] = {}
    engines: dict[str, EngineUse] = {}


class Receipt(_Record, frozen=True, kw_only=True):
    """What was found and chosen.

    ``evidence`` is the rung of the ladder that this run stands on. ``energy`` is what timing the
    candidates took, of all of them together, and None on a board without power sensors.
    """

    schema: Annotated[int, msgspec.Meta(ge=1, le=RECEIPT_SCHEMA)] = RECEIPT_SCHEMA
    bundle: str
    content_digest: Sha256
    created: str
    edgeglm: str
    board: Board
    target: str
    member: str | None
    evidence: Evidence
    lane: Literal["A", "B"]
    library: Library
    library_version: str
    chosen: str
    candidates: tuple[CandidateRecord, ...]
    before: Conditions
    after: Conditions
    energy: Energy | None = None
    notes: tuple[str, ...] = ()

    def candidate(self, variant: str) -> CandidateRecord:
        """Return the record of one variant. Raises KeyError if there is none."""
        return {record.variant: record for record in self.candidates}[variant]


def finalized_folder(origin: Path) -> Path:
    """Return where the receipt and the engines of the bundle at ``origin`` lie.

    A link to a bundle, such as ``current``, shares those of the bundle that it names, unless a folder lies
    beside the link itself: so a bundle on a medium that nobody can write may be finalized elsewhere.
    """
    origin = Path(os.path.abspath(origin))  # noqa: PTH100 - resolve() would follow the link at once
    beside = origin.with_name(f"{origin.name}.finalized")
    if origin.is_symlink() and not beside.is_dir():
        origin = origin.resolve()
        return origin.with_name(f"{origin.name}.finalized")
    return beside


def layer_table_of(model: Path) -> Path | None:
    """Return the layers of the newest engine that finalizing a model's bundle built from this very file."""
    found = []
    for folder in [
        parent for parent in model.absolute().parents[:3] if parent.name
    ]:  # models/int8/image.onnx
        for table in (finalized_folder(folder) / "engines").glob(f"*/{LAYER_TABLE}"):
            with suppress(UserError, OSError):
                built = plan_metadata_from_file(table.with_name(ENGINE_RECORD))
                if built.onnx_sha256 == sha256_file(model):
                    found.append((table.stat().st_mtime_ns, table))
    return max(found)[1] if found else None


def write_receipt(receipt: Receipt, folder: Path) -> Path:
    """Write the receipt in one step; an older one is whole until then. Raises UserError."""
    path, new = folder / RECEIPT_NAME, folder / f".{RECEIPT_NAME}.{uuid.uuid4().hex}"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with new.open("xb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(receipt), indent=1) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)
        sync_path(folder)
    return path


def read_receipt(folder: Path) -> Receipt | None:
    """Read the receipt of a finalized folder; None if there is none. Raises UserError if it is broken."""
    path = folder / RECEIPT_NAME
    remedy = "remove it and run 'edgeglm finalize' again"
    try:
        if path.stat().st_size > _MAX_RECEIPT_BYTES:
            raise UserError(f"{path} is larger than {_MAX_RECEIPT_BYTES} bytes; {remedy}")
        return msgspec.json.decode(path.read_bytes(), type=Receipt)
    except FileNotFoundError:
        return None
    except OSError as error:  # such as that of root, finalized under a strict umask: nothing is wrong with it
        raise UserError(f"cannot read {path}: {error.strerror}; let this user read it") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no receipt: {error}; {remedy}") from error


def why_foreign(receipt: Receipt, bundle: Bundle, board: Board) -> str | None:
    """Say why a receipt does not hold here; None if it does.

    It holds for this content of the bundle, on this kind of board, with this version of the library.
    """
    if receipt.content_digest != bundle.manifest.content_digest:
        return "it was made for another content of the bundle"
    if receipt.board.identity != board.identity:
        return f"it was made on another board ({receipt.board.words})"
    here = board.libraries.get(receipt.library)
    if here != receipt.library_version:
        return f"it was made with {receipt.library} {receipt.library_version}, here is {here or 'none'}"
    if receipt.chosen not in {variant.name for variant in bundle.manifest.variants}:
        return f"the bundle has no variant {receipt.chosen!r}"
    return None
