"""A whole deploy, as it is written down while it goes on, and read again for what was left undone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from edgeglm.core.errors import UserError
from edgeglm.deploy.delivery import Delivered
from edgeglm.deploy.hosts import HostName, host_from_text
from edgeglm.deploy.options import DeployOptions

Outcome = Literal["done", "failed", "skipped"]


class FleetPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many at a time.

    Attributes:
        parallel: At most so many at once.
        canary: So many go first, one after the other; the rest only if all of them are well. Of one device
            alone, it is the canary.
        max_failures: After so many failures no further device is begun.
        retries: How often a lost connection is tried again.
    """

    parallel: int = 20
    canary: int = 1
    max_failures: int = 1
    retries: int = 1


class DeviceOutcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of a summary."""

    device: str
    outcome: Outcome
    reason: str = ""
    exit_code: int = 0
    delivered: Delivered | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole deploy, as it is written down. Given to ``--replay`` it says what is still to be done."""

    schema: Literal[1] = 1
    edgeglm: str
    started: str
    seconds: float
    bundle: str
    reference: str | None = None
    content_digest: str
    options: DeployOptions
    plan: FleetPlan
    devices: tuple[DeviceOutcome, ...]

    @property
    def exit_code(self) -> int:
        """0 when all are done, else the highest of the devices', as of every command that asks several."""
        return max((one.exit_code or 1 for one in self.devices if one.outcome != "done"), default=0)


def summary_bytes(summary: Summary) -> bytes:
    """Return a summary as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n"


def write_summary(path: Path, summary: Summary) -> None:
    """Write a summary in one step, to be read by its owner alone. Raises UserError."""
    new = path.with_name(f".{path.name}.new")
    try:
        if path.exists() and not path.is_file():
            raise OSError(None, "it is no file")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(summary_bytes(summary))
        new.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write the summary {path}: {error.strerror}; name a file that can be written"
        ) from error


def summary_from_file(path: Path) -> Summary:
    """Read a summary. Raises UserError when it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summary)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the summary {path}: {error}; give what --summary wrote") from error


def still_to_do(summary: Summary) -> tuple[HostName, ...]:
    """Return the devices of a summary that are not done. Raises UserError when all are."""
    left = tuple(host_from_text(one.device) for one in summary.devices if one.outcome != "done")
    if not left:
        raise UserError("every device of that summary is done; nothing is left to replay")
    return left
