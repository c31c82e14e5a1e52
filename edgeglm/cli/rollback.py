"""`edgeglm rollback`: serve again what was served before."""

from __future__ import annotations

import click

from edgeglm.cli.console import App, json_option
from edgeglm.cli.deploy import SECONDS, root_option


@click.command(name="rollback")
@click.argument("devices", nargs=-1, required=True)
@click.option(
    "--ready-seconds",
    type=SECONDS,
    help="Until it must answer. Default: as long as its deploy waited, 60 at least.",
)
@click.option(
    "--lock-seconds", default=20.0, show_default=True, type=SECONDS, help="To wait for another deployer."
)
@root_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    devices: tuple[str, ...],
    ready_seconds: float | None,
    lock_seconds: float,
    root: str | None,
) -> None:
    """Switch each of DEVICES back to the bundle that it served before."""
    import asyncio

    from edgeglm.deploy.hosts import hosts_from_texts
    from edgeglm.deploy.inventory import inventory_at
    from edgeglm.deploy.remote import each, rolled_back

    app = ctx.ensure_object(App)
    inventory = inventory_at(app.store().root)
    answers = asyncio.run(
        each(
            hosts_from_texts(devices),
            lambda host: rolled_back(
                host, inventory, root=root, ready_seconds=ready_seconds, lock_seconds=lock_seconds
            ),
        )
    )
    for one in answers:
        if app.json:
            break
        said = one.error or f"slot {one.answer['to']} serves again, after {one.answer['seconds']} s"
        click.echo(f"{one.device}: {said}")  # rich would take a part of the time that this is about
    app.emit(answers)
    ctx.exit(max((one.exit_code for one in answers), default=0))
