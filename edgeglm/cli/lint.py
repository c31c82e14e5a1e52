"""`edgeglm lint`: what of an ONNX file would overflow in FP16."""

from __future__ import annotations

from pathlib import Path

import click

from edgeglm.cli.console import App, json_option


@click.command(name="lint")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="An .npz of samples, one array an input, to see values on.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write the model with what can be mended mended."
)
@json_option
@click.pass_obj
def command(app: App, model: Path, data: Path | None, output: Path | None) -> None:
    """Find what overflows or vanishes if MODEL is cast to FP16: by pattern, and by values seen on samples.

    With --output and --data, LayerNorms that are written out become the operator and masks are clamped;
    the nodes to keep in FP32 are listed.
    """
    from edgeglm.export.fp16_lint import lint_file

    report = lint_file(model, data=data, output=output)
    if report.findings:
        app.table(
            ("found", "at", ">largest", "remedy", "why"),
            [
                (f.kind, f.node, "" if f.largest is None else f"{f.largest:.3g}", f.remedy, f.why)
                for f in report.findings
            ],
            title=f"{model.name} in FP16",
        )
    else:
        app.print(f"{model.name}: nothing found that overflows in FP16")
    if data is None:
        app.note("only patterns and constants were looked at; give samples with --data to see values")
    if output is not None:
        made = f"{len(report.fused)} fused, {len(report.clamped)} masks clamped"
        app.print(f"{report.path}: {made}, keep {len(report.keep_fp32)} nodes in FP32")
    app.emit(report)
