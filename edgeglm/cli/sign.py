"""`edgeglm sign`: vouch for a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edgeglm.cli.console import App, bundle_argument, json_option


@click.command(name="sign")
@bundle_argument
@click.option(
    "--key",
    "keys",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="A .key file; may be given several times.",
)
@click.option("--replace", is_flag=True, help="Drop the signatures that are there.")
@json_option
@click.pass_obj
def command(app: App, bundle: Path, keys: tuple[Path, ...], replace: bool) -> None:
    """Verify every byte of BUNDLE, a folder or an archive, and add the signature of each key.

    A bundle may carry several: sign with the old key and the new one until every device has the new.
    """
    from edgeglm.bundle.sign import sign_bundle
    from edgeglm.bundle.signing import key_of

    signatures = sign_bundle(bundle, keys, replace=replace)
    rows = [(signature.name, key_of(signature, str(bundle)).id) for signature in signatures]
    for name, identity in rows:
        app.print(f"{bundle}: signed by {name} ({identity})")
    app.emit([{"name": name, "id": identity} for name, identity in rows])
