"""Finalize: make a verified bundle ready on the machine that will run it.

The board is detected, a way is chosen, the memory is checked, every candidate that passed its gate
at home is built here, held against the golden outputs from raw inputs on, and timed; the fastest of
those that answer as at home is chosen, and a receipt says all of it. Accuracy was decided at home;
the clock is read here.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgeglm import __version__
from edgeglm.bundle.goldens import LEAST_AGREEMENT, LEAST_COSINE, golden_check
from edgeglm.bundle.manifest import VariantRecord
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.receipt import (
    CandidateRecord,
    Evidence,
    Receipt,
    SelfTest,
    finalized_folder,
    write_receipt,
)
from edgeglm.compile.device_engines import BuildEngine, DeviceEngine, device_engines, sweep
from edgeglm.compile.owner import alone
from edgeglm.compile.route import EngineChoice, Route, check_memory_here, route_for
from edgeglm.compile.timed import MakeEngine, fastest, single_times
from edgeglm.compile.worker import engine_built_apart
from edgeglm.core.errors import EdgeglmError, GateError, UserError
from edgeglm.core.progress import Progress
from edgeglm.engines.board import Board, conditions
from edgeglm.engines.libraries import BrokenLibraryError
from edgeglm.engines.plan import PlanMetadata
from edgeglm.engines.power import PowerWatch
from edgeglm.engines.protocol import Engine

FloatRows = npt.NDArray[np.float32]
NativeEngine = Callable[[Path, PlanMetadata], Engine]


class Embedder(Protocol):
    """What turns raw input into embeddings: ``edgeglm.runtime.retrieval.Retriever`` does."""

    def embed_images(self, images: Sequence[bytes | Path]) -> FloatRows:
        """Return float32 [N, D]."""

    def embed_text(self, texts: Sequence[str]) -> FloatRows:
        """Return float32 [M, D]."""


MakeEmbedder = Callable[[Bundle, str, MakeEngine], AbstractContextManager[Embedder]]


@dataclass(frozen=True, kw_only=True)
class FinalizeOptions:
    """What a person may choose.

    Attributes:
        engine: Who runs the towers; "auto" is the target's own builder on a GPU.
        any_board: Go on although the board is outside the target.
        threads: Threads inside an operator of ONNX Runtime.
        rounds: Timed calls of each candidate's towers.
        cosine: The least cosine of any golden embedding with the one from home.
        top_k: The least mean agreement of the ten nearest gallery rows.
    """

    engine: EngineChoice = "auto"
    any_board: bool = False
    threads: int = 2
    rounds: int = 15
    cosine: float = LEAST_COSINE
    top_k: float = LEAST_AGREEMENT


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the machine brings, so that a test can bring its own.

    Attributes:
        embedder: Opens what embeds raw input with a variant through given engines.
        portable: Makes the ONNX Runtime engine of (ONNX file, threads).
        native: Makes the TensorRT engine of (plan, its record).
        build: Builds one engine, in a process of its own by default.
        root: Where temperatures and clocks are read.
    """

    embedder: MakeEmbedder
    portable: MakeEngine
    native: NativeEngine
    build: BuildEngine = engine_built_apart
    root: Path = Path("/")


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A candidate whose engines are there and whose self-test passed."""

    variant: VariantRecord
    selftest: SelfTest
    engines: Mapping[str, DeviceEngine]
    make: MakeEngine


def finalize(
    bundle: Bundle,
    *,
    board: Board,
    tools: Tools,
    progress: Progress,
    options: FinalizeOptions | None = None,
) -> Receipt:
    """Build, self-test, time and choose; write the receipt beside the bundle and return it.

    Args:
        bundle: An opened bundle, every byte verified.
        board: This machine, as ``this_board`` sees it.
        tools: What builds, runs and reads here.
        progress: Where the work is shown.
        options: What was chosen; the defaults if None.

    Raises:
        UserError: the bundle was not verified, the board is outside the target, the library or the
            memory is lacking, another finalize of this bundle is running.
        GateError: no candidate answers here as it did at home; no receipt is written.
        EdgeglmError: none could be built or run, as where TensorRT is installed but broken.
    """
    if not bundle.verified:
        raise UserError("the bundle was not verified; open it with its digests checked")
    options = options or FinalizeOptions()
    route = route_for(bundle, board, engine=options.engine, any_board=options.any_board)
    check_memory_here(board, route, bundle)
    folder = finalized_folder(bundle.origin)
    with alone(folder), progress.task(f"finalize {bundle.manifest.name}", len(route.variants) + 1) as task:
        before = conditions(tools.root)
        ready: list[_Ready] = []
        records = [
            CandidateRecord(variant=name, status="left out", reason=reason)
            for name, reason in route.left_out.items()
        ]
        for variant in route.variants:
            task.note(variant.name)
            outcome = _tried(bundle, variant, board, route, tools, options, progress)
            if isinstance(outcome, _Ready):
                ready.append(outcome)
            else:
                records.append(outcome)
            task.advance()
        if not ready:
            raise _nothing_ready(bundle, records)
        task.note("timing")
        makers = {one.variant.name: one.make for one in ready}
        watch = PowerWatch(tools.root)
        with watch.watching():
            timed = single_times(bundle, makers, threads=options.threads, rounds=options.rounds)
        after = conditions(tools.root)
        task.advance()
        chosen = fastest(bundle, timed)
        receipt = Receipt(
            bundle=bundle.manifest.name,
            content_digest=bundle.manifest.content_digest,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            edgeglm=__version__,
            board=board,
            target=bundle.manifest.target.name,
            member=route.member.name if route.member else None,
            evidence=_evidence(board, route),
            lane=route.lane,
            library=route.library,
            library_version=route.version,
            chosen=chosen,
            candidates=(*_passed(ready, timed, chosen), *records),
            before=before,
            after=after,
            energy=watch.energy,
            notes=route.notes,
        )
        write_receipt(receipt, folder)
        used = {use.signature: use for record in receipt.candidates for use in record.engines.values()}
        sweep(folder / "engines", used)
        return receipt


def _tried(
    bundle: Bundle,
    variant: VariantRecord,
    board: Board,
    route: Route,
    tools: Tools,
    options: FinalizeOptions,
    progress: Progress,
) -> _Ready | CandidateRecord:
    """Build one candidate and hold it against its goldens; a failure is a record and not the end.

    What no other candidate would mend, such as a full disk or a broken library, is raised.
    """
    engines: dict[str, DeviceEngine] = {}
    make = tools.portable
    try:
        if route.library != "onnxruntime":
            engines = device_engines(
                bundle,
                variant,
                board=board,
                route=route,
                folder=finalized_folder(bundle.origin) / "engines",
                build=tools.build,
                progress=progress,
            )
            make = _native_maker(bundle, variant, engines, tools.native)
    except UserError:
        raise
    except EdgeglmError as error:
        return CandidateRecord(variant=variant.name, status="failed", reason=str(error))
    uses = {tower: engine.use for tower, engine in engines.items()}
    try:
        with tools.embedder(bundle, variant.name, make) as embedding:
            result = golden_check(bundle, embedding.embed_images, embedding.embed_text, variant=variant.name)
    except BrokenLibraryError:
        raise
    except EdgeglmError as error:
        return CandidateRecord(variant=variant.name, status="failed", reason=str(error), engines=uses)
    selftest = SelfTest(
        passed=result.agrees(cosine=options.cosine, top_k=options.top_k),
        images=result.images,
        texts=result.texts,
        image_cosine_min=_finite(result.image_cosine_min),
        text_cosine_min=_finite(result.text_cosine_min),
        top_k=result.top_k,
        top_k_agreement=_finite(result.top_k_agreement),
    )
    if selftest.passed:
        return _Ready(variant=variant, selftest=selftest, engines=engines, make=make)
    reason = (
        f"its golden outputs differ here: worst cosine {selftest.image_cosine_min:.4f} over pictures and "
        f"{selftest.text_cosine_min:.4f} over texts, top {selftest.top_k} agree to "
        f"{selftest.top_k_agreement:.0%}"
    )
    return CandidateRecord(
        variant=variant.name,
        status="failed",
        reason=reason,
        selftest=selftest,
        engines=uses,
    )


def _nothing_ready(bundle: Bundle, records: Sequence[CandidateRecord]) -> EdgeglmError:
    name = bundle.manifest.name
    reasons = "; ".join(f"{record.variant}: {record.reason}" for record in records)
    if any(record.selftest for record in records):
        return GateError(
            f"no variant of {name} answers here as it did where it was made ({reasons}); "
            "build the bundle for this board anew"
        )
    return EdgeglmError(
        f"no variant of {name} could be built or run here ({reasons}); "
        "mend what is named, or pass --engine onnxruntime"
    )


def _native_maker(
    bundle: Bundle, variant: VariantRecord, engines: Mapping[str, DeviceEngine], native: NativeEngine
) -> MakeEngine:
    plans = {bundle.file(name): engines[tower] for tower, name in variant.files.items()}

    def make(path: Path, _: int) -> Engine:
        return native(plans[path].plan, plans[path].metadata)

    return make


def _passed(
    ready: Sequence[_Ready], timed: Mapping[str, Mapping[str, float]], chosen: str
) -> list[CandidateRecord]:
    totals = {name: sum(times.values()) for name, times in timed.items()}
    records = []
    for one in ready:
        name = one.variant.name
        took = f"one picture and one text in {totals[name]:.2f} ms"
        reason = took if name == chosen else f"{took}, {chosen} takes {totals[chosen]:.2f} ms"
        records.append(
            CandidateRecord(
                variant=name,
                status="chosen" if name == chosen else "passed",
                reason=reason,
                selftest=one.selftest,
                latency_ms=dict(timed[name]),
                engines={tower: engine.use for tower, engine in one.engines.items()},
            )
        )
    return records


def _evidence(board: Board, route: Route) -> Evidence:
    if route.library == "onnxruntime":
        return "ONNX Runtime"
    return "real device" if board.soc else "real GPU"


def _finite(value: float) -> float:
    """JSON has no NaN, and an output that is not a number agrees with nothing."""
    return value if np.isfinite(value) else -1.0
