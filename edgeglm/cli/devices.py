"""`edgeglm devices`: what was deployed where."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from edgeglm.cli.console import App, json_option
from edgeglm.core.words import ago, human_bytes, printable

if TYPE_CHECKING:
    from edgeglm.core.store import Store
    from edgeglm.deploy.inventory import DeviceRecord


@click.command(name="devices")
@click.argument("names", nargs=-1)
@click.option("--refresh", is_flag=True, help="Ask them now; without it, as they were last seen.")
@click.option("--forget", is_flag=True, help="Drop NAMES from the list; nothing is done to them.")
@json_option
@click.pass_context
def command(ctx: click.Context, names: tuple[str, ...], refresh: bool, forget: bool) -> None:
    """List the devices that were deployed to from here, or those of NAMES."""
    import asyncio

    from edgeglm.core.errors import unknown_name
    from edgeglm.deploy.hosts import hosts_from_texts
    from edgeglm.deploy.inventory import inventory_at
    from edgeglm.deploy.remote import each, refreshed

    app = ctx.ensure_object(App)
    inventory = inventory_at(app.store().root)
    if forget and not names:
        raise click.UsageError("--forget needs the NAMES of what to forget")
    if forget:
        for name in names:
            inventory.forget(name)
        names = ()
    code, errors = 0, dict[str, str]()
    if refresh and (asked := names or tuple(one.name for one in inventory.devices())):
        answers = asyncio.run(
            each(hosts_from_texts(asked), lambda host: refreshed(host, inventory, root=None))
        )
        for one in answers:
            if one.error:
                app.print(f"{one.device}: {one.error}")
                errors[one.device] = one.error
                code = max(code, one.exit_code)
    known = inventory.devices()
    for name in () if refresh else names:
        if name not in [one.name for one in known]:
            raise unknown_name("device", name, [one.name for one in known])
    found = [one for one in known if not names or one.name in names]
    rows = []
    for device in found:
        slot = device.slots.get(device.serving or "", {})
        digest = str(slot.get("content_digest", ""))[:12]
        rows.append(
            (
                device.name,
                device.board,
                device.jetpack or "-",
                device.tensorrt or "-",
                printable(f"{slot.get('bundle', '-')} {digest}") if slot else "nothing",
                "ready" if device.ready else "not ready" if slot else "-",
                _variant(device, slot),
                human_bytes(device.free_bytes),
                ago(time.time() - device.seen),
            )
        )
    headings = ["device", "board", "JetPack", "TensorRT", "serves", "state", "variant", ">free", ">seen"]
    if rows:
        app.table(headings, rows)
    else:
        app.print("no device was deployed to from here; 'edgeglm deploy BUNDLE user@host' does that")
    if app.json:
        app.emit(
            [
                *(with_error(with_evidence(one, app.store()), errors.pop(one.name, "")) for one in found),
                *(never_seen(name, error) for name, error in errors.items()),
            ]
        )
    ctx.exit(code)


def _variant(device: DeviceRecord, slot: Mapping[str, Any]) -> str:
    """Return what finalize chose for the bundle that serves; the last receipt may be of another one."""
    last = device.receipt if device.receipt.get("content_digest") == slot.get("content_digest") else {}
    return printable(str(slot.get("chosen") or last.get("chosen") or "-"))


def with_evidence(device: DeviceRecord, store: Store) -> DeviceRecord:
    """Return the record with the folder of the newest that such a board with such a library sent home."""
    import msgspec

    from edgeglm.deploy.evidence import evidence_in

    found = evidence_in(store, kind=device.kind, receipt=device.receipt)
    return msgspec.structs.replace(device, evidence=str(found[0].folder)) if found else device


def with_error(device: DeviceRecord, error: str) -> DeviceRecord:
    """Return the record with why the device could not be asked."""
    import msgspec

    return msgspec.structs.replace(device, error=error)


def never_seen(name: str, error: str) -> DeviceRecord:
    """Return the record of a device of which nothing is known but that it could not be asked."""
    from edgeglm.deploy.inventory import DeviceRecord

    return DeviceRecord(name=name, seen=0.0, root="", board="", machine="", python="", error=error)
