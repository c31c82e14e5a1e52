"""`edgeglm logs`: what the server of a device wrote."""

from __future__ import annotations

import click

from edgeglm.cli.console import App, json_option
from edgeglm.cli.deploy import root_option


@click.command(name="logs")
@click.argument("device")
@click.option("-n", "--lines", default=100, show_default=True, type=click.IntRange(min=1), help="Lines.")
@root_option
@json_option
@click.pass_obj
def command(app: App, device: str, lines: int, root: str | None) -> None:
    """Print the last lines that the server on DEVICE wrote."""
    import asyncio

    from edgeglm.deploy.hosts import host_from_text
    from edgeglm.deploy.inventory import inventory_at
    from edgeglm.deploy.remote import log_lines

    inventory = inventory_at(app.store().root)
    found = asyncio.run(log_lines(host_from_text(device), inventory, root=root, lines=lines))
    for line in () if app.json else found:  # as they are: each is a document that others parse
        click.echo(line)
    app.emit({"device": device, "lines": found})
