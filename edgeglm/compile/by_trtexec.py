"""Finalize by ``trtexec``: for a board whose TensorRT this Python cannot import.

The work is that of the shell finalize (see ``shell``): each candidate is built, held against its
goldens and timed by ``trtexec``, and ``receipt-trtexec.json`` is written last. What runs is the
script of *this* installation with what it needs of the bundle filled in, never the copy that the
bundle carries: a bundle is data, and to finalize one must not run its code. So a bundle of another
edgeglm, or one without the script, is finalized all the same.

The plans are for programs that bring a TensorRT of their own (``trtexec``, Triton, a C++ runner):
``edgeglm run`` needs the Python binding for them, and takes ONNX Runtime without it.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import msgspec

from edgeglm.bundle.atomic import disk_errors, scratch_folder
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.paths import inside
from edgeglm.bundle.receipt import finalized_folder
from edgeglm.compile.contract import target_of
from edgeglm.compile.owner import alone
from edgeglm.compile.route import member_for
from edgeglm.compile.shell import SCRIPT_NAME, jetsons, shell_sources
from edgeglm.core.errors import EdgeglmError, GateError, UserError
from edgeglm.core.progress import Progress
from edgeglm.engines.board import Board, Conditions
from edgeglm.engines.power import Energy

RECEIPT_NAME = "receipt-trtexec.json"
_STOP_SECONDS = 10


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the records of the receipt that the script writes."""


class TrtexecTower(_Record, frozen=True, kw_only=True):
    """One engine: where it lies under ``engines/``, how near its goldens came, its median latency.

    ``top_k_agreement`` is the mean share of the ten nearest among the first rows of the gallery that are
    those of home; None for a bundle without a gallery.
    """

    signature: str
    worst_cosine: float
    b1_ms: float
    top_k_agreement: float | None = None


class TrtexecCandidate(_Record, frozen=True, kw_only=True):
    """What became of one variant; ``status`` is "passed" or the reason why not."""

    variant: str
    status: str
    total_ms: float
    towers: dict[str, TrtexecTower]


class TrtexecBoard(_Record, frozen=True, kw_only=True):
    """The board as the script read it, with the memory that was free before it built."""

    model: str
    sm: str
    l4t: str
    power_mode: str
    memory_bytes: int = 0
    memory_available_bytes: int = 0


class TrtexecReceipt(_Record, frozen=True, kw_only=True):
    """What the script found and chose; ``energy`` is what timing all candidates took.

    ``signature_checked`` says that a trusted key's signature was checked before the script was run, which
    only edgeglm does.
    """

    schema: int
    bundle: str
    models_digest: str
    created: str
    board: TrtexecBoard
    target: str
    library: str
    library_version: str
    lane: str
    signature_checked: bool
    chosen: str
    candidates: tuple[TrtexecCandidate, ...]
    before: Conditions = Conditions()
    after: Conditions = Conditions()
    energy: Energy | None = None


def needs_trtexec(bundle: Bundle, board: Board) -> bool:
    """Return whether native engines can be had here, and by ``trtexec`` alone."""
    member, _ = member_for(board, target_of(bundle))
    native = member is not None and member.builder == "tensorrt"
    there = board.trtexec is not None and board.trtexec_version is not None
    return native and there and "tensorrt" not in board.libraries


def finalize_by_trtexec(
    bundle: Bundle, *, progress: Progress, any_board: bool = False, root: Path = Path("/")
) -> TrtexecReceipt:
    """Build, test and time every candidate with ``trtexec`` and return the receipt that was written.

    Args:
        bundle: An opened bundle, every byte verified; of an archive, what was unpacked of it is built from.
        progress: Shows the step that is at work.
        any_board: Go on although the board is outside the target.
        root: The root file system of the board.

    Raises:
        UserError: the bundle was not verified or has no goldens; the board, its memory or its ``trtexec``
            will not do.
        GateError: no candidate answers here as it did at home.
        EdgeglmError: ``trtexec`` could build or run none, or the script died.
    """
    if not bundle.verified:
        raise UserError("the bundle was not verified; open it with its digests checked")
    target = target_of(bundle)
    if not jetsons(target):
        raise UserError(
            f"trtexec builds for Jetsons, and {target.target.name} has none among its members; "
            "leave --engine out"
        )
    sources = shell_sources(bundle, target)
    with scratch_folder("edgeglm-trtexec-") as folder:
        for name, data in sources.items():
            place = inside(Path(folder), name)
            with disk_errors(place):
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(data)
        script = Path(folder, SCRIPT_NAME)
        command = ["sh", str(script), *(["--any-board"] if any_board else [])]
        finalized = finalized_folder(bundle.origin)
        environment = {
            **os.environ,
            "EDGEGLM_BUNDLE": str(bundle.path.absolute()),
            "EDGEGLM_SHELL": folder,
            "EDGEGLM_FINALIZED": str(finalized),
            "EDGEGLM_LOCKED": "yes",
            "EDGEGLM_SIGNATURE_CHECKED": "true" if bundle.signature.signer is not None else "false",
        }
        if root != Path("/"):
            environment["EDGEGLM_ROOT"] = str(root)
        with alone(finalized) as lock:  # which the script takes where it is run by hand
            title = f"finalize {bundle.manifest.name} by trtexec"
            _run(command, environment, progress, title=title, lock=lock)
    written = finalized / RECEIPT_NAME
    try:
        return msgspec.json.decode(written.read_bytes(), type=TrtexecReceipt)
    except (OSError, msgspec.MsgspecError) as error:
        raise EdgeglmError(f"{written} is no receipt: {error}; run the same command again") from error


def _run(
    command: list[str], environment: dict[str, str], progress: Progress, *, title: str, lock: int
) -> None:
    """Run the script, show its lines, and turn its exit into an error.

    It inherits the lock: should this process be killed, ``trtexec`` goes on until its engine is built.
    """
    with tempfile.TemporaryFile() as words, progress.task(title, None) as task:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            errors="replace",
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then stops it in order
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                task.note(line.strip())
                task.advance()
            status = child.wait()
        finally:
            _stopped(child)
        words.seek(0)
        said = words.read().decode("utf-8", "replace").strip()
    if status == 0:
        return
    last = re.sub(r"^error: ", "", said.splitlines()[-1]) if said else f"exit {status} and no word"
    if status == 2:
        raise UserError(last)
    if status == 3:
        raise GateError(last)
    if said.rpartition("\n")[2].startswith("error: "):
        raise EdgeglmError(last)
    raise EdgeglmError(f"finalize by trtexec died: {last}; run the same command again")


def _stopped(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        # All of its session: a trtexec that it waits for would hold its own exit back.
        for signal_number in (15, 9):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_STOP_SECONDS)
                break
    if child.stdout is not None:
        child.stdout.close()
