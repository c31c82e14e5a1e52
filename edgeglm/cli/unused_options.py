"""Options that a command would not heed, refused instead of ignored."""

from __future__ import annotations

from collections.abc import Sequence

import click
from click.core import ParameterSource


def refuse_options(names: Sequence[str], why: str) -> None:
    """Raise a usage error if one of these parameters of the running command was given.

    Args:
        names: As the command's function calls them.
        why: What it is and what to do, after the option's own name.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and given not in (ParameterSource.DEFAULT, None):
            raise click.UsageError(f"{max(parameter.opts, key=len)} would be ignored: {why}")
