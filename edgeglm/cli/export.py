"""`edgeglm export`: the towers of a pretrained model as ONNX files."""

from __future__ import annotations

from pathlib import Path

import click

from edgeglm.cli.console import App, json_option


@click.command(name="export")
@click.argument("model")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option(
    "--resolution", type=click.IntRange(min=0), default=0, help="Side of the images; 0 for the model's own."
)
@click.option("--max-length", type=click.IntRange(min=3), default=32, show_default=True, help="Most tokens.")
@click.option("--opset", type=click.IntRange(18, 24), default=20, show_default=True, help="ONNX opset.")
@json_option
@click.pass_obj
def command(app: App, model: str, output: Path, resolution: int, max_length: int, opset: int) -> None:
    """Write image.onnx and text.onnx of MODEL: an asset name, hf:owner/name, or a transformers folder."""
    from edgeglm.build.export_model import export_model

    written = export_model(
        model,
        output,
        app.store(),
        app.progress,
        resolution=resolution,
        max_length=max_length,
        opset=opset,
    )
    app.table(
        ("tower", "file", ">parameters", ">largest difference to torch"),
        [(t.tower, output / t.file, f"{t.parameters:,}", f"{t.parity_max_abs:.1e}") for t in written],
    )
    app.emit({"output": output, "towers": written})
