"""`edgeglm adapt`: the teacher of a recipe, evaluated, without a student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, json_option

if TYPE_CHECKING:
    from edgeglm.core.stage import StageResult


@click.command(name="adapt")
@click.option("--recipe", default="default", show_default=True, help="A shipped recipe or a .toml file.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override one value, such as teacher.domain.pseudo_label_rounds=2; may be given again.",
)  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), help="Your own pairs: a folder or a Parquet file.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="CPU threads.")
@click.option("--skip-bad", is_flag=True, help="Leave out pairs whose image or caption is unusable.")
@json_option
@click.pass_obj
def command(
    app: App,
    recipe: str,
    overrides: tuple[str, ...],
    data: Path | None,
    output: Path,
    threads: int,
    skip_bad: bool,
) -> None:
    """Adapt pretrained towers to a domain and write the teacher.

    OUTPUT holds the backbones, the image head and the text tower as ONNX, the tokenizer, the embeddings
    of all images, metrics.json by track and teacher.json. A build of the same recipe reuses all of it.
    """
    import msgspec

    from edgeglm.build.adapting import adapt_teacher
    from edgeglm.cli.build import note_measured, note_unread_data, resolved_recipe
    from edgeglm.core.stage import Context

    resolved = resolved_recipe(recipe, overrides, data, skip_bad)
    note_unread_data(app, resolved)
    with app.progress.task(f"Adapting for {resolved.name}"):
        context = Context(store=app.store(), progress=app.progress, threads=threads)

        def on_stage(result: StageResult) -> None:
            app.note(f"{result.stage}: {'reused' if result.reused else f'{result.seconds:.1f} s'}")
            note_measured(app, result)

        adapted = adapt_teacher(resolved, output, context, on_stage=on_stage)
    app.table(
        ["track", ">queries", ">gallery", ">mAP@10", ">95 % interval", ">R@1", ">R@10"],
        [
            (
                name,
                metric.queries,
                metric.gallery,
                f"{metric.map10.value:.3f}",
                f"{metric.map10.low:.3f} to {metric.map10.high:.3f}",
                f"{metric.r1:.3f}",
                f"{metric.r10:.3f}",
            )
            for name, metric in adapted.metrics.items()
        ],
    )
    measured = adapted.teacher.provenance["measured"]
    app.print(f"{adapted.folder}: {measured['parameters']['lora']:,} parameters of the text tower were tuned")
    app.emit(
        {
            "folder": adapted.folder,
            "digest": adapted.teacher.digest,
            "metrics": msgspec.to_builtins(adapted.metrics),
            "measured": measured,
        }
    )
