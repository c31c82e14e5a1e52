"""The words that a deploy hands on to ``edgeglm serve`` on a device, held against that command here."""

from __future__ import annotations

from collections.abc import Sequence

import click
from click.core import ParameterSource

from edgeglm.core.errors import UserError

_HERE = ParameterSource.COMMANDLINE
_OURS = {"host": "--host", "port": "--port"}
_TLS = ("tls_certificate", "tls_key")


def check_serve_flags(flags: Sequence[str]) -> None:
    """Raise UserError for words that the server would not take, or could not get ready with."""
    from edgeglm.cli.console import App
    from edgeglm.cli.serve import command

    try:
        with command.make_context("serve", ["bundle", *flags], obj=App()) as given:
            named = {name for name in given.params if given.get_parameter_source(name) is _HERE}
    except click.exceptions.Exit as error:
        raise UserError("--serve-flag=--help serves nothing; run 'edgeglm serve --help' here") from error
    except click.UsageError as error:
        words = error.format_message().rstrip(".")
        raise UserError(
            f"edgeglm serve does not take --serve-flag: {words}; see edgeglm serve --help"
        ) from error
    for name, flag in _OURS.items():
        if name in named:
            raise UserError(
                f"{flag} of the server is this command's own; pass {flag} in place of --serve-flag"
            )
    if "when_told" in named:
        raise UserError("--when-told is the supervisor's; leave that --serve-flag out")
    if named & set(_TLS):
        raise UserError(
            "a deployed server is asked over plain HTTP whether it is ready, so one with TLS never would be; "
            "leave --tls-certificate and --tls-key out, and end TLS in a proxy before it"
        )
