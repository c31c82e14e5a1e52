"""`edgeglm export-repository`: a bundle for NVIDIA Triton."""

from __future__ import annotations

from pathlib import Path

import click

from edgeglm.cli.console import App, bundle_argument, json_option, trust_options


@click.command(name="export-repository")
@bundle_argument
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="The new model repository's folder."
)
@click.option("--variant", help="Which variant's ONNX files; the bundle's default without it.")
@click.option("--finalized", is_flag=True, help="Serve what finalize chose here, its TensorRT plans if any.")
@click.option(
    "--queue-us", default=1000, show_default=True, type=click.IntRange(min=0), help="Batching wait."
)
@trust_options
@json_option
@click.pass_obj
def command(
    app: App, bundle: Path, output: Path, variant: str | None, finalized: bool, queue_us: int
) -> None:
    """Write a Triton model repository with one model for each tower of BUNDLE.

    Each model has a config.pbtxt with dynamic batching, and beside it what a client needs to make
    its input: preprocessing.json and, for texts, tokenizer.json.
    """
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.compile.triton import triton_models, write_repository
    from edgeglm.core.errors import UserError
    from edgeglm.runtime.finalized import choice_here

    if finalized and variant:
        raise click.UsageError("--finalized serves the variant that was chosen here; leave --variant out")
    with open_bundle(bundle, trust=app.trust()) as opened:
        receipt = None
        if finalized:
            choice = choice_here(opened)
            if choice.receipt is None:
                raise UserError(f"no receipt of this machine ({choice.words}); run 'edgeglm finalize' first")
            receipt = choice.receipt
        models = triton_models(opened, variant=variant, receipt=receipt, queue_microseconds=queue_us)
        name = receipt.chosen if receipt else opened.variant(variant).name
        write_repository(opened, models, output, name)
    for model in models:
        app.print(f"{output / model.name}: {model.file} of variant {name}")
    app.emit({"repository": output, "variant": name, "models": [model.name for model in models]})
