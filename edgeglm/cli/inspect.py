"""`edgeglm inspect`: what a bundle holds."""

from __future__ import annotations

from pathlib import Path

import click

from edgeglm.cli.console import App, bundle_argument, json_option, trust_options


@click.command(name="inspect")
@bundle_argument
@trust_options
@json_option
@click.pass_obj
def command(app: App, bundle: Path) -> None:
    """Show what a bundle holds: variants and their figures, target, stages, licences.

    A bundle's folder is read without hashing its files; `edgeglm verify` does that.
    """
    from edgeglm.bundle.inspect import inspect_rows
    from edgeglm.bundle.verify import open_bundle

    with open_bundle(bundle, verify=False, trust=app.trust()) as opened:
        sections, tables = inspect_rows(opened)
        for section in sections:
            app.pairs(section.rows, title=section.title)
        for table in tables:
            app.table(table.columns, table.rows, title=table.title)
        app.emit(opened.manifest)
