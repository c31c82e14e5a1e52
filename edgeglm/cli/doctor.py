"""`edgeglm doctor`: what this machine can do, tried and not assumed."""

from __future__ import annotations

import click

from edgeglm.cli.console import App, json_option

_STYLES = {"ok": "green", "warn": "yellow", "error": "bold red"}


@click.command(name="doctor")
@json_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """Check this machine for what a build or a run needs. Exits with 1 when something is wrong."""
    from rich.text import Text

    from edgeglm.engines.environment import doctor_findings

    app = ctx.ensure_object(App)
    findings = doctor_findings()
    for finding in findings:
        mark = (f"{finding.level:<6}", _STYLES[finding.level])
        app.print(Text.assemble(mark, f"{finding.subject}: {finding.text}"))
    app.emit(findings)
    if any(finding.level == "error" for finding in findings):
        ctx.exit(1)
