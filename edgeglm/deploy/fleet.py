"""Many devices: a canary first, then a bounded number at a time, and no more once enough have failed."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from edgeglm.core.errors import EdgeglmError, fault_words
from edgeglm.deploy.connection import ConnectionLostError
from edgeglm.deploy.delivery import Tools, deliver
from edgeglm.deploy.hosts import HostName, bounded
from edgeglm.deploy.options import DeployOptions
from edgeglm.deploy.parcel import Parcel
from edgeglm.deploy.report import Report
from edgeglm.deploy.summary import DeviceOutcome, FleetPlan, Summary

OnChange = Callable[[str, str, str], None]
"""Is told (device, state, note) of every change."""

_RETRY_SECONDS = (1.0, 4.0)
_GOING_BACK_SECONDS = 60.0


async def deploy_fleet(
    hosts: Sequence[HostName],
    parcel: Parcel,
    options: DeployOptions,
    plan: FleetPlan,
    tools: Tools,
    on_change: OnChange,
    *,
    reference: Path | None = None,
    on_summary: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Deploy to all of them. What fails is a row of the summary; nothing is raised for a single device.

    ``on_summary`` is told how it stands before the first device and after each: who ends this in the middle
    has a summary all the same, in which what was not done is skipped.
    """
    from edgeglm import __version__

    loop = asyncio.get_running_loop()
    begun = loop.time()
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    results: dict[str, DeviceOutcome] = {}
    for host in hosts:
        on_change(str(host), "waiting", "")

    def standing() -> Summary:
        unfinished = "the deploy ended before it was done; deploy to it"
        return Summary(
            edgeglm=__version__,
            started=started,
            seconds=round(loop.time() - begun, 3),
            bundle=str(parcel.path.resolve()),
            reference=None if reference is None else str(reference.resolve()),
            content_digest=parcel.manifest.content_digest,
            options=options,
            plan=plan,
            devices=tuple(results.get(str(host)) or skipped(str(host), unfinished) for host in hosts),
        )

    def settle(found: DeviceOutcome) -> None:
        results[found.device] = found
        on_summary(standing())

    def skip(host: HostName, reason: str) -> None:
        settle(skipped(str(host), reason))
        on_change(str(host), "skipped", reason)

    async def one(host: HostName) -> None:
        failed = sum(found.outcome == "failed" for found in results.values())
        if failed >= plan.max_failures:
            skip(host, f"{failed} failed before it; mend that, then deploy to it")
            return
        settle(await _outcome(host, parcel, options, plan, tools, on_change))

    on_summary(standing())
    canaries = list(hosts[: plan.canary]) if len(hosts) > 1 else []
    for host in canaries:
        await one(host)
    rest = hosts[len(canaries) :]
    if any(found.outcome != "done" for found in results.values()):
        for host in rest:
            skip(host, "the canary failed; mend that, then deploy to it")
    else:
        await bounded(rest, one, plan.parallel)
    return standing()


def skipped(device: str, reason: str) -> DeviceOutcome:
    """Return the row of a device that was not deployed to."""
    return DeviceOutcome(device=device, outcome="skipped", reason=reason, exit_code=1)


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
                longest = options.ready_seconds + _GOING_BACK_SECONDS  # a switch that goes on alone is locked
                options = replace(options, lock_seconds=max(options.lock_seconds, longest))
        except EdgeglmError as error:
            reason, code = str(error), error.exit_code
            break
        except Exception as error:  # of one device: the others' deliveries go on
            reason, code = fault_words(error), EdgeglmError.exit_code
            break
    on_change(name, "failed", reason)
    return DeviceOutcome(device=name, outcome="failed", reason=reason, exit_code=code)
