"""A deploy as a command asks for it: the store, the inventory and the wheels put together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

from edgeglm.core.digest import sha256_json
from edgeglm.core.errors import UserError
from edgeglm.core.store import Store
from edgeglm.deploy.delivery import Tools
from edgeglm.deploy.evidence import Evidence, kept_evidence, kind_of, timing_caches
from edgeglm.deploy.fleet import OnChange, deploy_fleet
from edgeglm.deploy.hosts import HostName
from edgeglm.deploy.inventory import inventory_at
from edgeglm.deploy.options import DeployOptions
from edgeglm.deploy.parcel import opened_parcel
from edgeglm.deploy.summary import FleetPlan, Summary, write_summary
from edgeglm.deploy.wheels import Wheels, wheels_for
from edgeglm.engines.board import Board


def deployed(
    bundle: Path,
    hosts: Sequence[HostName],
    options: DeployOptions,
    plan: FleetPlan,
    store: Store,
    on_change: OnChange,
    *,
    reference: Path | None = None,
    summary_path: Path | None = None,
    content_digest: str | None = None,
) -> Summary:
    """Deploy a bundle to devices and return the summary.

    Args:
        bundle: A folder or an archive.
        hosts: The devices.
        options: For all of them.
        plan: How many at a time.
        store: Where wheels, the inventory and what the devices send home lie.
        on_change: Is told of every change.
        reference: A folder with ``pairs.jsonl``.
        summary_path: Is written before the first device and after each, so it is there however this ends.
        content_digest: What the bundle must be; None takes any.

    Raises:
        UserError: the bundle, the reference or the summary's place; nothing has been deployed then.
    """
    made: dict[tuple[tuple[int, int], str, str], Wheels] = {}

    making = threading.Lock()

    def wheels(python: tuple[int, int], machine: str, glibc: str) -> Wheels:
        kind = (python, machine, glibc)
        with making:  # once for each kind of device
            if kind not in made:
                made[kind] = wheels_for(python, machine, glibc, store.root)
        return made[kind]

    seen: dict[str, dict[str, Path]] = {}

    def caches(board: Board) -> dict[str, Path]:
        # As they were when the first board of a kind was met: what comes home replaces them.
        kind = sha256_json(kind_of(board))
        if kind not in seen:
            seen[kind] = timing_caches(store, board, scratch / kind)
        return seen[kind]

    tools = Tools(
        inventory=inventory_at(store.root),
        wheels=wheels,
        keep=lambda evidence: _keep(evidence, store),
        caches=caches,
    )
    written = False

    def on_summary(summary: Summary) -> None:
        nonlocal written
        if summary_path is None:
            return
        try:
            write_summary(summary_path, summary)
            written = True
        except UserError:
            if not written:  # a disk that fills up later stops no device, and is told at the end
                raise

    with store.scratch() as scratch, opened_parcel(bundle, reference=reference) as parcel:
        actual = parcel.manifest.content_digest
        if content_digest is not None and actual != content_digest:
            raise UserError(
                f"{bundle} is another bundle now ({actual[:12]}) than the one that was deployed "
                f"({content_digest[:12]}); put that one back, or name bundle and devices to deploy this one"
            )
        work = deploy_fleet(
            hosts, parcel, options, plan, tools, on_change, reference=reference, on_summary=on_summary
        )
        summary = asyncio.run(work)
    if summary_path is not None:
        write_summary(summary_path, summary)
    return summary


def _keep(evidence: Evidence, store: Store) -> None:
    kept_evidence(evidence, store)
