"""`edgeglm explain`: what a build would reuse, and the input that changed where it would not."""

from __future__ import annotations

from pathlib import Path

import click

from edgeglm.cli.build import RECIPE_HELP, SET_HELP, resolved_recipe
from edgeglm.cli.console import App, json_option


@click.command(name="explain")
@click.option("--target", required=True, help="A known target (see edgeglm targets) or a .toml file.")
@click.option("--recipe", default="default", show_default=True, help=RECIPE_HELP)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@click.option("--data", type=click.Path(path_type=Path), help="Your own pairs: a folder or a Parquet file.")
@click.option("--skip-bad", is_flag=True, help="As the build was told: leave out unusable pairs.")
@json_option
@click.pass_obj
def command(
    app: App, target: str, recipe: str, overrides: tuple[str, ...], data: Path | None, skip_bad: bool
) -> None:
    """Say for each stage of a build whether the store has it, and if not, why it would run.

    Nothing is downloaded.
    """
    from edgeglm.build.history import explain
    from edgeglm.build.pipeline import plan_build
    from edgeglm.targets.schema import load_target

    wanted = load_target(target)
    store = app.store()
    asked = resolved_recipe(recipe, overrides, data, skip_bad)
    found = explain(plan_build(asked, wanted, store, app.progress, download=False), store)
    rows = []
    for entry in found:
        took = f"took {entry.seconds:.1f} s" if entry.seconds is not None else ""
        why = entry.reasons or (took,)
        rows += [
            (entry.stage if i == 0 else "", entry.state if i == 0 else "", line) for i, line in enumerate(why)
        ]
    app.table(("stage", "state", "why"), rows)
    app.emit(found)
