"""`edgeglm remove`: take edgeglm off a device, or what does not serve there."""

from __future__ import annotations

import click

from edgeglm.cli.console import App, json_option
from edgeglm.cli.deploy import SECONDS, root_option
from edgeglm.core.words import human_bytes


@click.command(name="remove")
@click.argument("devices", nargs=-1, required=True)
@click.option("--old", is_flag=True, help="Only the former bundle and what it alone needs.")
@click.option(
    "--lock-seconds", default=20.0, show_default=True, type=SECONDS, help="To wait for another deployer."
)
@root_option
@json_option
@click.pass_context
def command(
    ctx: click.Context, devices: tuple[str, ...], old: bool, lock_seconds: float, root: str | None
) -> None:
    """Stop the server on each of DEVICES and remove all that edgeglm put there.

    With --old what serves goes on; there is then nothing to roll back to.
    """
    import asyncio

    from edgeglm.deploy.hosts import hosts_from_texts
    from edgeglm.deploy.inventory import inventory_at
    from edgeglm.deploy.remote import each, removed

    app = ctx.ensure_object(App)
    inventory = inventory_at(app.store().root)
    answers = asyncio.run(
        each(
            hosts_from_texts(devices),
            lambda host: removed(host, inventory, root=root, old=old, lock_seconds=lock_seconds),
        )
    )
    for one in answers:
        if one.error:
            app.print(f"{one.device}: {one.error}")
            continue
        left = ", ".join(one.answer.get("left", ()))
        kept = f"; not edgeglm's, and still there: {left}" if left else ""
        app.print(f"{one.device}: {human_bytes(one.answer['bytes'])} freed{kept}")
    app.emit(answers)
    ctx.exit(max((one.exit_code for one in answers), default=0))
