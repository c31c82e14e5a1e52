"""`edgeglm fusions`: what runtimes fuse of an ONNX file, and which node keeps them from the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, json_option

if TYPE_CHECKING:
    from edgeglm.export.fusion import Runtime


@click.command(name="fusions")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--layers", type=click.Path(path_type=Path), help="An engine's layers (trtexec --exportLayerInfo)."
)
@click.option("--write", type=click.Path(path_type=Path), help="Write the model rewritten to be fused.")
@click.option(
    "--for",
    "runtime",
    type=click.Choice(["tensorrt", "onnxruntime"]),
    default="tensorrt",
    show_default=True,
    help="Whom --write is for.",
)
@json_option
@click.pass_obj
def command(app: App, model: Path, layers: Path | None, write: Path | None, runtime: Runtime) -> None:
    """List each pattern of MODEL that a runtime should fuse: fused, or missed with the node that prevents it.

    ONNX Runtime is asked; TensorRT is judged by its documentation, or by an engine's layers: those of
    --layers, else of the engine that edgeglm finalize built from MODEL, where that lies in a bundle.
    """
    from edgeglm.bundle.receipt import layer_table_of
    from edgeglm.export.engine_layers import layers_from_file
    from edgeglm.export.fusion import fusions_of_file, rewritten_file

    if layers is None and (layers := layer_table_of(model)) is not None:
        app.note(f"layers of the engine in {layers.parent}")
    report = fusions_of_file(model, layers=layers_from_file(layers) if layers else ())
    app.table(
        ("pattern", "runtime", ">fused", ">found"),
        [
            (pattern, name, fused, found)
            for name in ("onnxruntime", "tensorrt")
            for pattern, (fused, found) in report.counts(name).items()
        ],
        title=model.name,
    )
    others = [(row.pattern, row.at, row.runtime, row.into) for row in report.rows if not row.applies]
    if others:
        app.table(("found", "at", "runtime", "what becomes of it"), others)
    missed = [row for row in report.rows if row.applies and not row.fused]
    if missed:
        app.table(
            ("missed", "at", "runtime", "prevented by", "why"),
            [(row.pattern, row.at, row.runtime, row.blocker, row.why) for row in missed],
        )
    if report.quantizers:
        app.table(("Q/DQ in the way", "why"), [(note.node, note.why) for note in report.quantizers])
    done = rewritten_file(model, write, runtime) if write else None
    if done is not None:
        made = ", ".join(f"{len(nodes)} {kind}" for kind, nodes in done.made.items()) or "nothing to rewrite"
        app.print(f"{write}: {made}")
    app.emit({"report": report, "layers": layers, "written": write, "rewritten": done.made if done else {}})
