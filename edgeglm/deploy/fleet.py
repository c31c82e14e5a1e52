"""Many devices: a canary first, then a bounded number at a time, and no more once enough have failed."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.deploy.connection import ConnectionLostError
from edgeglm.deploy.delivery import Delivered, Tools, deliver
from edgeglm.deploy.hosts import HostName, host_from_text
from edgeglm.deploy.options import DeployOptions
from edgeglm.deploy.parcel import Parcel
from edgeglm.deploy.report import Report

T = TypeVar("T")
Outcome = Literal["done", "failed", "skipped"]
OnChange = Callable[[str, str, str], None]
"""Is told (device, state, note) of every change."""

_RETRY_SECONDS = (1.0, 4.0)


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
        """0 when all are done, else the first failure's."""
        return next((one.exit_code or 1 for one in self.devices if one.outcome != "done"), 0)


def hosts_from_texts(texts: Sequence[str]) -> tuple[HostName, ...]:
    """Parse the devices of a command line. Raises UserError for none, a malformed one, or one twice."""
    hosts = tuple(map(host_from_text, texts))
    if not hosts:
        raise UserError("no device was named; give at least one user@host")
    doubles = sorted({host.text for host in hosts if [h.text for h in hosts].count(host.text) > 1})
    if doubles:
        raise UserError(f"{', '.join(doubles)} is named twice; name each device once")
    return hosts


async def deploy_fleet(
    hosts: Sequence[HostName],
    parcel: Parcel,
    options: DeployOptions,
    plan: FleetPlan,
    tools: Tools,
    on_change: OnChange,
    *,
    reference: Path | None = None,
) -> Summary:
    """Deploy to all of them. What fails is a row of the summary; nothing is raised for a single device."""
    from edgeglm import __version__

    loop = asyncio.get_running_loop()
    begun = loop.time()
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    results: dict[str, DeviceOutcome] = {}
    for host in hosts:
        on_change(str(host), "waiting", "")

    def skip(host: HostName, reason: str) -> None:
        name = str(host)
        results[name] = DeviceOutcome(device=name, outcome="skipped", reason=reason, exit_code=1)
        on_change(name, "skipped", reason)

    async def one(host: HostName) -> None:
        failed = sum(found.outcome == "failed" for found in results.values())
        if failed >= plan.max_failures:
            reason = f"{failed} failed before it; mend that, then deploy to it"
            skip(host, reason)
            return
        results[str(host)] = await _outcome(host, parcel, options, plan, tools, on_change)

    canaries = list(hosts[: plan.canary]) if len(hosts) > 1 else []
    for host in canaries:
        await one(host)
    rest = hosts[len(canaries) :]
    if any(found.outcome != "done" for found in results.values()):
        for host in rest:
            reason = "the canary failed; mend that, then deploy to it"
            skip(host, reason)
    else:
        await bounded(rest, one, plan.parallel)
    return Summary(
        edgeglm=__version__,
        started=started,
        seconds=round(loop.time() - begun, 3),
        bundle=str(parcel.path.resolve()),
        reference=None if reference is None else str(reference.resolve()),
        content_digest=parcel.manifest.content_digest,
        options=options,
        plan=plan,
        devices=tuple(results[str(host)] for host in hosts),
    )


async def bounded(items: Sequence[T], work: Callable[[T], Awaitable[Any]], parallel: int) -> None:
    """Run ``work`` on all items, at most ``parallel`` at a time."""
    places = asyncio.Semaphore(max(1, parallel))

    async def placed(item: T) -> None:
        async with places:
            await work(item)

    await asyncio.gather(*map(placed, items))


async def _outcome(
    host: HostName,
    parcel: Parcel,
    options: DeployOptions,
    plan: FleetPlan,
    tools: Tools,
    on_change: OnChange,
) -> DeviceOutcome:
    name = str(host)
    for attempt in range(plan.retries + 1):
        report = Report(on_change=lambda state, note: on_change(name, state, note))
        try:
            delivered = await deliver(host, parcel, options, tools, report)
            return DeviceOutcome(device=name, outcome="done", delivered=delivered)
        except ConnectionLostError as error:
            reason, code = str(error), error.exit_code
            if attempt < plan.retries:
                on_change(name, "waiting", "the connection was lost, trying again")
                await asyncio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
        except EdgeglmError as error:
            reason, code = str(error), error.exit_code
            break
    on_change(name, "failed", reason)
    return DeviceOutcome(device=name, outcome="failed", reason=reason, exit_code=code)


def summary_bytes(summary: Summary) -> bytes:
    """Return a summary as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n"


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
