"""`edgeglm finalize`: make a bundle ready on the machine that will run it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, bundle_argument, json_option, trust_options

if TYPE_CHECKING:
    from edgeglm.bundle.opened import Bundle
    from edgeglm.compile.by_trtexec import TrtexecReceipt
    from edgeglm.compile.finalize import Embedder
    from edgeglm.compile.timed import MakeEngine


@click.command(name="finalize")
@bundle_argument
@click.option(
    "--engine",
    type=click.Choice(["auto", "native", "trtexec", "onnxruntime"]),
    default="auto",
    show_default=True,
    help="Who runs it; auto is the target's own builder on a GPU (trtexec where this Python does not see "
    "TensorRT) and ONNX Runtime where there is none.",
)
@click.option("--any-board", is_flag=True, help="Go on although this board is outside the target.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1, 256), help="Threads.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=7), help="Timed calls.")
@trust_options
@json_option
@click.pass_obj
def command(app: App, bundle: Path, engine: str, any_board: bool, threads: int, rounds: int) -> None:
    """Verify BUNDLE, build its candidates on this machine, test and time them, and keep the fastest.

    Writes BUNDLE.finalized/receipt.json, which `edgeglm run` follows from then on. Engines whose
    build signature is unchanged are used again. Exits with 3 when no candidate answers here as it
    did where the bundle was made.
    """
    from edgeglm.bundle.receipt import RECEIPT_NAME, finalized_folder
    from edgeglm.bundle.trust import accept, check_memory
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.compile.by_trtexec import finalize_by_trtexec, needs_trtexec
    from edgeglm.compile.finalize import FinalizeOptions, Tools, finalize
    from edgeglm.engines.board import this_board
    from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
    from edgeglm.engines.tensorrt_engine import TensorRtEngine

    board, trust = this_board(), app.trust()
    with open_bundle(bundle, trust=trust) as opened:
        check_memory(trust, opened.signature)
        if engine == "trtexec" or (engine in ("auto", "native") and needs_trtexec(opened, board)):
            by_hand = finalize_by_trtexec(opened, progress=app.progress, any_board=any_board)
            accept(trust, opened.manifest, opened.signature)
            _print_by_trtexec(app, by_hand, finalized_folder(bundle))
            return
        options = FinalizeOptions(
            engine=engine,  # type: ignore[arg-type]  # click has checked it
            any_board=any_board,
            threads=threads,
            rounds=rounds,
        )
        receipt = finalize(
            opened,
            board=board,
            tools=Tools(
                embedder=_embedder,
                portable=lambda path, count: OnnxRuntimeEngine(path, threads=count),
                native=TensorRtEngine,
            ),
            progress=app.progress,
            options=options,
        )
        accept(trust, opened.manifest, opened.signature)
    place = finalized_folder(bundle) / RECEIPT_NAME
    app.print(f"{receipt.board.words}; {'; '.join(receipt.notes)}")
    app.table(
        ["variant", "status", ">picture ms", ">text ms", "why"],
        [
            (
                record.variant,
                record.status,
                f"{record.latency_ms['image_b1_ms']:.2f}" if record.latency_ms else "-",
                f"{record.latency_ms['text_b1_ms']:.2f}" if record.latency_ms else "-",
                record.reason,
            )
            for record in receipt.candidates
        ],
    )
    app.print(
        f"chosen {receipt.chosen}, {receipt.library} {receipt.library_version}; "
        f"seen by {receipt.evidence}; {place}"
    )
    app.emit({"receipt": place, **_plain(receipt)})


def _print_by_trtexec(app: App, receipt: TrtexecReceipt, folder: Path) -> None:
    from edgeglm.compile.by_trtexec import RECEIPT_NAME

    app.print(f"{receipt.board.model}, SM {receipt.board.sm}, L4T {receipt.board.l4t}")
    rows = [
        (
            record.variant,
            "chosen" if record.variant == receipt.chosen else record.status,
            *(f"{record.towers[tower].b1_ms:.2f}" for tower in ("image", "text")),
            f"{min(tower.worst_cosine for tower in record.towers.values()):.4f}",
        )
        for record in receipt.candidates
    ]
    app.table(["variant", "status", ">picture ms", ">text ms", ">worst cosine"], rows)
    app.print(
        f"chosen {receipt.chosen}, TensorRT {receipt.library_version} by trtexec; {folder / RECEIPT_NAME}"
    )
    app.note(
        "this Python does not see TensorRT, so 'edgeglm run' and 'serve' take ONNX Runtime here; to run "
        "these engines in them, make the environment with --system-site-packages and finalize again"
    )
    app.emit({"receipt": folder / RECEIPT_NAME, **_plain(receipt)})


def _embedder(bundle: Bundle, variant: str, make: MakeEngine) -> AbstractContextManager[Embedder]:
    from edgeglm.runtime.retrieval import Retriever

    return Retriever(bundle, variant=variant, engine=make)


def _plain(receipt: object) -> dict[str, object]:
    import msgspec

    plain = msgspec.to_builtins(receipt)
    assert isinstance(plain, dict)
    return plain
