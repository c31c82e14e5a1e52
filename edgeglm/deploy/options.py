"""What a person may choose of a deploy."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class DeployOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person may choose, for all devices alike.

    Attributes:
        root: Where it goes on the device; if None where it went before, else the device's own default.
        service: How it is kept running; "auto" is the best that is there.
        python: An interpreter on the device that has edgeglm already; None brings one along.
        host: The address that it listens on there.
        port: The port; 0 takes a free one.
        serve_flags: Further words for ``edgeglm serve``.
        activate: Whether it is served in the end; else it stays staged in the spare slot.
        ready_seconds: How long a new bundle may take until it answers.
        lock_seconds: How long to wait for another deployer.
        tolerance: How much mAP@10 on the reference may fall.
        any_board, any_clock, allow_unsigned, allow_downgrade: What is refused without them.
        engine: As ``edgeglm finalize --engine``.
        rounds: As ``edgeglm finalize --rounds``.
    """

    root: str | None = None
    service: str = "auto"
    python: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    serve_flags: tuple[str, ...] = ()
    activate: bool = True
    ready_seconds: float = 120.0
    lock_seconds: float = 20.0
    tolerance: float = 0.0
    any_board: bool = False
    any_clock: bool = False
    allow_unsigned: bool = False
    allow_downgrade: bool = False
    engine: str = "auto"
    rounds: int = 15


def token_file_of(flags: Sequence[str]) -> str | None:
    """Return the file that ``--token-file`` among words for ``edgeglm serve`` names; the last one counts."""
    found = None
    for number, word in enumerate(flags):
        name, equals, value = word.partition("=")
        if name == "--token-file":
            found = value if equals else next(iter(flags[number + 1 :]), None)
    return found
