"""`edgeglm targets`: where a bundle can run."""

from __future__ import annotations

import click

from edgeglm.cli.console import App, json_option


@click.command(name="targets")
@click.argument("name", required=False)
@json_option
@click.pass_obj
def command(app: App, name: str | None) -> None:
    """List the known targets, or show NAME (or a profile such as ./my.toml) with its sources."""
    from edgeglm.targets.description import TABLE_HEADER, UNVERIFIED, describe_target, target_table_rows
    from edgeglm.targets.schema import known_targets, load_target, resolve_target

    if name is None:
        app.table(TABLE_HEADER, target_table_rows())
        app.print(f"{UNVERIFIED} not checked against its source; edgeglm targets NAME shows the sources")
        app.emit([load_target(known) for known in known_targets()])
        return
    target = load_target(name)
    app.pairs(describe_target(target))
    app.emit(resolve_target(target))
