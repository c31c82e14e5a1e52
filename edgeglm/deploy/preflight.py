"""What is refused before a byte of the bundle travels: the wrong board, a wrong clock, too little space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec

from edgeglm.core.errors import UserError
from edgeglm.core.words import printable
from edgeglm.deploy.device.facts import BOARD_FILES, SHORTENED_FILES
from edgeglm.engines.board import Board, board_from_files

if TYPE_CHECKING:
    from edgeglm.deploy.parcel import Parcel

CLOCK_SECONDS = 600.0
_ROOM = 1.1
_ENVIRONMENT_BYTES = 700 << 20
"""What the device half takes once installed, roughly; measured in docs/bench/device_install.md."""

_JETPACKS = {"35": "5", "36": "6", "38": "7", "39": "7"}


def board_from_facts(facts: Mapping[str, Any]) -> Board:
    """Return the board whose files a device has sent.

    Raises UserError for a file that was not asked for: what a device says is never a path here.
    """
    with TemporaryDirectory(prefix="edgeglm-board-") as folder:
        for name, text in facts["board_files"].items():
            if name not in (*BOARD_FILES, *SHORTENED_FILES):
                raise UserError(f"it sent a file {name!r} that nobody asked for; do not trust that device")
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        board = board_from_files(Path(folder))
    machine = board.machine if board.soc else str(facts["machine"])
    board = msgspec.structs.replace(board, machine=machine)
    if facts["gpu"] and board.sm is None:
        gpu = facts["gpu"]
        board = msgspec.structs.replace(board, sm=int(gpu["sm"]), gpu=gpu["name"])
    words = {name: said for name, said in msgspec.structs.asdict(board).items() if isinstance(said, str)}
    return msgspec.structs.replace(board, **{name: printable(said) for name, said in words.items()})


def jetpack_of(board: Board) -> str | None:
    """Return the JetPack's major version that an L4T release belongs to."""
    return _JETPACKS.get(board.l4t.partition(".")[0]) if board.l4t else None


def check_board(board: Board, parcel: Parcel, *, any_board: bool) -> None:
    """Raise UserError when the board is outside the bundle's target, with what was found."""
    from edgeglm.compile.contract import target_of  # a rollback needs none of it, and shall be quick
    from edgeglm.compile.route import member_for

    resolved = target_of(parcel.bundle)
    member, why = member_for(board, resolved)
    if board.sm is None:
        why = f"this is {board.words}, and no GPU is seen on it"
    if member is None and not any_board:
        raise UserError(
            f"this device is outside target {resolved.target.name}: {why}; build a bundle for it "
            f"(edgeglm build --target ...), or pass --any-board at your own risk (bundle {parcel.path})"
        )


def check_clock(facts: Mapping[str, Any], *, now: float) -> None:
    """Raise UserError when the device's clock is far from this one's: receipts and signatures carry dates."""
    off = float(facts["time"]) - now
    if abs(off) > CLOCK_SECONDS:
        size = f"{abs(off) / 86400:.1f} days" if abs(off) > 86400 / 2 else f"{abs(off) / 60:.0f} minutes"
        raise UserError(
            f"the device's clock is {size} {'ahead of' if off > 0 else 'behind'} this one's; "
            "set it (timedatectl set-ntp true), or pass --any-clock"
        )


def check_space(needed: int, free: int, root: str, *, installs: bool) -> None:
    """Raise UserError when what must come does not fit."""
    wanted = int(needed * _ROOM) + (_ENVIRONMENT_BYTES if installs else 0)
    if wanted > free:
        raise UserError(
            f"{wanted / 1e6:,.1f} MB are needed in {root} on the device and {free / 1e6:,.1f} MB are free; "
            "free some ('edgeglm remove --old' drops the former bundle), or pass --root on another disk"
        )
