"""`edgeglm lower`: an ONNX file for an older TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, json_option

if TYPE_CHECKING:
    from edgeglm.targets.schema import Lane


@click.command(name="lower")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option(
    "--lane",
    type=click.Choice(["A", "B"]),
    default="A",
    show_default=True,
    help="A: TensorRT 8.5, opset 16, FP32 with Q/DQ. B: TensorRT 10.3 and later, opset 19 or 20.",
)
@click.option("--target", "target_name", help="A target's name or .toml file, which must take the lane.")
@click.option(
    "--calibration-cache",
    "cache",
    type=click.Path(path_type=Path),
    help="Take the Q/DQ out and write their ranges here, for builders that choose INT8 themselves (the DLA).",
)
@json_option
@click.pass_obj
def command(
    app: App, model: Path, output: Path, lane: Lane, target_name: str | None, cache: Path | None
) -> None:
    """Write MODEL for the operators of an older TensorRT, or refuse the node that has no equivalent."""
    from edgeglm.export.lanes import lane_file
    from edgeglm.targets.schema import load_target

    target = load_target(target_name) if target_name else None
    lowered = lane_file(model, output, lane, target=target, cache=cache)
    rows = [
        ("file", str(output)),
        ("opset", str(lowered.opset)),
        ("rewritten", ", ".join(f"{count} {op}" for op, count in lowered.rewritten.items()) or "nothing"),
        ("FP16 weights widened", str(lowered.widened)),
        ("INT8 weights behind Q/DQ", str(lowered.quantized)),
        ("keep in FP32", f"{len(lowered.fp32_nodes)} nodes" if lowered.fp32_nodes else "nothing"),
        *([("calibration cache", str(cache))] if cache else []),
    ]
    app.pairs(rows, title=f"lane {lane}")
    app.emit(
        {
            "output": output,
            "lane": lane,
            "opset": lowered.opset,
            "rewritten": lowered.rewritten,
            "fp32_nodes": lowered.fp32_nodes,
            "calibration_cache": cache,
        }
    )
