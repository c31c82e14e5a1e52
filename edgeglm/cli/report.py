"""`edgeglm report`: the HTML page of a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from edgeglm.cli.console import App, bundle_argument, json_option, trust_options
from edgeglm.core.errors import UserError


@click.command(name="report")
@bundle_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Copy the page here: a file, or a folder. Needed for an archive.",
)
@click.option("--open", "in_browser", is_flag=True, help="Open the page in the browser.")
@trust_options
@json_option
@click.pass_obj
def command(app: App, bundle: Path, output: Path | None, in_browser: bool) -> None:
    """Print where the report of a bundle is, or copy it. The page is one file and needs nothing else."""
    from edgeglm.bundle.verify import open_bundle

    with open_bundle(bundle, verify=not bundle.is_dir(), trust=app.trust()) as opened:
        page = opened.file("report.html")
        if output is not None:
            page = _copied(page, output)
        elif opened.temporary is not None:
            raise UserError(f"{bundle} is an archive; say where its report goes with --output")
    if in_browser:
        click.launch(page.resolve().as_uri())
    app.print(str(page))
    app.emit({"report": page})


def _copied(page: Path, output: Path) -> Path:
    target = output / page.name if output.is_dir() else output
    try:
        shutil.copyfile(page, target)
    except shutil.SameFileError:
        return target
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror}; choose a folder that is there and can be written"
        ) from error
    return target
