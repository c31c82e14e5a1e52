"""A deploy as a command asks for it: the store, the inventory and the wheels put together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from edgeglm.core.store import Store
from edgeglm.deploy.delivery import Tools
from edgeglm.deploy.evidence import kept_evidence
from edgeglm.deploy.fleet import FleetPlan, OnChange, Summary, deploy_fleet
from edgeglm.deploy.hosts import HostName
from edgeglm.deploy.inventory import inventory_at
from edgeglm.deploy.options import DeployOptions
from edgeglm.deploy.parcel import opened_parcel
from edgeglm.deploy.wheels import Wheels, wheels_for


def deployed(
    bundle: Path,
    hosts: Sequence[HostName],
    options: DeployOptions,
    plan: FleetPlan,
    store: Store,
    on_change: OnChange,
    *,
    reference: Path | None = None,
) -> Summary:
    """Deploy a bundle to devices and return the summary. Raises UserError for the bundle or the reference."""
    made: dict[tuple[tuple[int, int], str, str], Wheels] = {}

    def wheels(python: tuple[int, int], machine: str, glibc: str) -> Wheels:
        # Once for each kind of device; the event loop waits, as all the others need the same.
        kind = (python, machine, glibc)
        if kind not in made:
            made[kind] = wheels_for(python, machine, glibc, store.root)
        return made[kind]

    tools = Tools(
        inventory=inventory_at(store.root), wheels=wheels, keep=lambda evidence: _keep(evidence, store)
    )
    with opened_parcel(bundle, reference=reference) as parcel:
        return asyncio.run(deploy_fleet(hosts, parcel, options, plan, tools, on_change, reference=reference))


def _keep(evidence: object, store: Store) -> None:
    from edgeglm.deploy.evidence import Evidence

    assert isinstance(evidence, Evidence)
    kept_evidence(evidence, store)
