"""The choice that ``edgeglm finalize`` made for this machine, as something that can be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.receipt import (
    ENGINE_PLAN,
    ENGINE_RECORD,
    Receipt,
    finalized_folder,
    read_receipt,
    why_foreign,
)
from edgeglm.core.errors import UserError
from edgeglm.engines.board import Board, this_board
from edgeglm.engines.plan import plan_metadata_from_file
from edgeglm.engines.tensorrt_engine import TensorRtEngine
from edgeglm.runtime.retrieval import EngineFactory, TowerEngine, onnxruntime_engine


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which variant to run, through what, and why; ``receipt`` is None where none holds here."""

    variant: str
    engine: EngineFactory
    words: str
    receipt: Receipt | None = None


def choice_here(
    bundle: Bundle, variant: str | None = None, *, board: Callable[[], Board] = this_board
) -> Choice:
    """Return what the receipt chose, or the asked or default variant through ONNX Runtime.

    A receipt that is of another board, content or library version does not hold; ``words`` says so.
    Raises UserError for an unknown variant, or a receipt whose engines are gone or altered.
    """
    name = bundle.variant(variant).name
    folder = finalized_folder(bundle.origin)
    receipt = read_receipt(folder)
    if receipt is None:
        return Choice(variant=name, engine=onnxruntime_engine, words="ONNX Runtime")
    if variant not in (None, receipt.chosen):
        words = f"ONNX Runtime, as asked; the receipt of this board chose {receipt.chosen}"
        return Choice(variant=name, engine=onnxruntime_engine, words=words)
    if (why := why_foreign(receipt, bundle, board())) is not None:
        words = f"ONNX Runtime; the receipt beside the bundle does not hold here: {why}"
        return Choice(variant=name, engine=onnxruntime_engine, words=words)
    words = f"{receipt.library} {receipt.library_version}, chosen by the receipt of {receipt.created}"
    engine = (
        onnxruntime_engine
        if receipt.library == "onnxruntime"
        else _plans(bundle, receipt, folder / "engines")
    )
    return Choice(variant=receipt.chosen, engine=engine, words=words, receipt=receipt)


def _plans(bundle: Bundle, receipt: Receipt, folder: Path) -> EngineFactory:
    uses = receipt.candidate(receipt.chosen).engines
    files = bundle.variant(receipt.chosen).files
    places = {bundle.file(name): folder / uses[tower].signature for tower, name in files.items()}

    def make(path: Path, _: int) -> TowerEngine:
        place = places[path]
        metadata = plan_metadata_from_file(place / ENGINE_RECORD)
        expected = {use.plan_sha256 for use in uses.values()}
        if metadata.plan_sha256 not in expected:
            raise UserError(f"{place} is not the engine that was tested; run 'edgeglm finalize' again")
        return TensorRtEngine(place / ENGINE_PLAN, metadata)

    return make
