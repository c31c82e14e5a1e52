"""`edgeglm calibrate`: the samples that ranges are found on, as an artifact with its proofs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeglm.cli.console import App, json_option
from edgeglm.cli.unused_options import refuse_options
from edgeglm.core.words import human_bytes

if TYPE_CHECKING:
    from edgeglm.calibration.curve import Point
    from edgeglm.calibration.schemes import Method
    from edgeglm.calibration.sets import CalibrationSet, TowerRecord

#: The options of :func:`drawing_options`.
DRAWING = (
    "samples", "batch_size", "seed", "resolution", "mean", "std", "tokenizer", "max_length", "lowercase",
)  # fmt: skip
METHODS = ("max", "percentile", "entropy", "mse")
F = TypeVar("F", bound=Callable[..., Any])
_SHOWN = 8


def drawing_options(command: F) -> F:
    """Give a command the options of how samples are drawn, passed as ``drawing`` and ``tokenizer``."""

    @functools.wraps(command)
    def with_drawing(
        *args: Any,
        samples: int,
        batch_size: int,
        seed: int,
        resolution: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        max_length: int,
        lowercase: bool,
        **others: Any,
    ) -> Any:
        from edgeglm.calibration.drawing import Drawing
        from edgeglm.calibration.intake import Reading

        reading = Reading(
            resolution=resolution, mean=mean, std=std, max_length=max_length, lowercase=lowercase
        )
        drawing = Drawing(samples=samples, batch_size=batch_size, seed=seed, reading=reading)
        return command(*args, drawing=drawing, **others)

    found: Any = with_drawing
    for option in reversed(
        (
            click.option(
                "--samples", type=click.IntRange(2), default=128, show_default=True, help="To draw."
            ),
            click.option(
                "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Recorded."
            ),
            click.option("--seed", default=0, show_default=True, help="Of the draw."),
            click.option(
                "--resolution", type=click.IntRange(0), default=0, help="Of images; 0: the model's."
            ),
            click.option("--mean", nargs=3, type=float, default=(0.0, 0.0, 0.0), help="Of RGB in [0, 1]."),
            click.option("--std", nargs=3, type=float, default=(1.0, 1.0, 1.0), help="Of RGB in [0, 1]."),
            click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json, for texts."),
            click.option(
                "--max-length", type=click.IntRange(3), default=32, show_default=True, help="Tokens."
            ),
            click.option("--lowercase", is_flag=True, help="Lower texts first."),
        )
    ):
        found = option(found)
    return found  # type: ignore[no-any-return]


@click.command(name="calibrate")
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("--model", type=click.Path(path_type=Path), required=True, help="The FP32 ONNX file.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--evaluation", type=click.Path(path_type=Path), help="Data that no sample may be in.")
@click.option("--curve", help="Sizes such as 16,32,64,128: what INT8 keeps when calibrated on so many.")
@click.option("--metric", help="module:function, called with a file's path: what the curve shows besides.")
@click.option("--method", type=click.Choice(METHODS), default="max", show_default=True, help="Of the curve.")
@click.option("--shape", "shapes", multiple=True, help="name:1x3x224x224, for random data.")
@click.option("--allow-random-calibration", is_flag=True, help="Write noise; the record says so.")
@drawing_options
@json_option
@click.pass_obj
def command(
    app: App,
    data: Path | None,
    model: Path,
    output: Path,
    evaluation: Path | None,
    curve: str | None,
    metric: str | None,
    method: Method,
    shapes: tuple[str, ...],
    allow_random_calibration: bool,
    tokenizer: Path | None,
    drawing: Any,
) -> None:
    """Draw a calibration set for a model from DATA and write it with digests and proofs.

    DATA is an .npz (one array for each input), a folder of .npz files or of images, or a .jsonl with
    {"image": path, "text": words, "stratum": name} a line. Sub-folders and strata are drawn evenly.
    """
    import msgspec

    from edgeglm.calibration.drawing import (
        TOWER,
        calibration_set_for_model,
        random_set_for_model,
    )
    from edgeglm.core.errors import UserError

    if data is None and not allow_random_calibration:
        raise UserError(
            "no data to calibrate on; give samples that the model will really see, "
            "or --allow-random-calibration, whose ranges are wrong for real inputs"
        )
    if data is None:
        refuse_options(("evaluation", "tokenizer"), "random numbers need none; give DATA, or leave it out")
    else:
        refuse_options(("shapes", "allow_random_calibration"), "it is for random numbers; leave DATA out")
    if curve is None:
        refuse_options(("metric", "method"), "it is of the curve; give --curve too")
    points: list[Point] = []
    finish = None
    if curve is not None:  # before anything is written
        from edgeglm.calibration.curve import curve_of_sizes, largest_size, sizes_from_text
        from edgeglm.calibration.demands import fixed_batch
        from edgeglm.calibration.scoring import metric_from_name

        sizes = sizes_from_text(curve)
        largest_size(drawing.samples, sizes, fixed=fixed_batch(model))
        function = None if metric is None else metric_from_name(metric)

        def finish(made: CalibrationSet) -> None:
            batches = made.batches(TOWER)
            points.extend(
                curve_of_sizes(model, batches, sizes, method=method, metric=function, progress=app.progress)
            )
            text = msgspec.json.format(msgspec.json.encode(points), indent=1) + b"\n"
            (made.folder / "curve.json").write_bytes(text)

    if data is None:
        drawn = random_set_for_model(
            model,
            output,
            drawing=drawing,
            shapes=shapes,
            allow_random=allow_random_calibration,
            finish=finish,
        )
    else:
        drawn = calibration_set_for_model(
            data,
            model,
            output,
            drawing=drawing,
            tokenizer=tokenizer,
            evaluation=evaluation,
            finish=finish,
        )
    _show(app, drawn, points)
    app.emit({"output": output, "record": drawn.record, "curve": points})


def note_repeated(app: App, part: TowerRecord) -> None:
    """Say how many of the samples are copies: they weigh more than others, and widen no range."""
    if part.repeated:
        distinct = len(part.samples) - part.repeated
        app.note(f"{part.repeated} of {len(part.samples)} samples equal an earlier one; {distinct} differ")


def _show(app: App, drawn: CalibrationSet, points: list[Point]) -> None:
    for tower, part in drawn.record.towers.items():
        size = (drawn.folder / part.file).stat().st_size
        app.print(
            f"{drawn.folder / part.file}: {len(part.samples)} samples, batches of "
            f"{drawn.record.batch_size}, {human_bytes(size)}, from {drawn.record.source} data"
        )
        note_repeated(app, part)
        if part.coverage:
            app.table(
                ["trait", ">values drawn", ">of", ">share of all samples", "most frequent"],
                [
                    (
                        name,
                        len(cover.drawn),
                        cover.candidates,
                        f"{cover.share:.0%}",
                        ", ".join(f"{v}: {n}" for v, n in _frequent(cover.drawn)),
                    )
                    for name, cover in part.coverage.items()
                ],
                title=f"what the samples of {tower} cover",
            )
        proof = part.disjointness
        app.print(
            f"disjoint from {proof.evaluation_samples} evaluation samples (by digest)"
            if proof.evaluation_samples
            else "no evaluation data given, so nothing was proved disjoint (--evaluation)"
        )
    if points:
        app.table(
            [">samples", ">kept", ">mean cosine", ">worst cosine", ">ranges moved"],
            [
                (
                    p.samples,
                    "-" if p.kept is None else f"{p.kept:.4f}",
                    f"{p.mean_cosine:.5f}",
                    f"{p.min_cosine:.5f}",
                    f"{p.moved:.2%}",
                )
                for p in points
            ],
            title="INT8 calibrated on the first so many samples",
        )


def _frequent(drawn: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(drawn.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
