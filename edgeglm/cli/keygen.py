"""`edgeglm keygen`: a key pair to sign bundles with."""

from __future__ import annotations

from pathlib import Path

import click

from edgeglm.cli.console import App, json_option


@click.command(name="keygen")
@click.argument("name")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(), help="Where to put it; here by default."
)
@json_option
@click.pass_obj
def command(app: App, name: str, folder: Path) -> None:
    """Make NAME.key, to sign with and to keep to yourself, and NAME.pub, to put on devices.

    A device takes only bundles signed by a key in its trust folder, $EDGEGLM_TRUST or
    ~/.config/edgeglm/trust, as soon as one is there.
    """
    from edgeglm.bundle.signing import make_key

    private, public = make_key(folder, name)
    app.print(f"{private}: sign with it, keep it to yourself")
    app.print(f"{private.with_suffix('.pub')}: put it into a device's trust folder")
    app.print(f"key {public.id}")
    app.emit({"private": private, "public": private.with_suffix(".pub"), "id": public.id})
