"""`edgeglm bench`: how fast a bundle is on this machine, as MLPerf LoadGen measures it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, bundle_argument, json_option
from edgeglm.core.errors import UserError

if TYPE_CHECKING:
    from edgeglm.bench.measurement import Change, Measurement

_SCENARIOS = ("single-stream", "multi-stream", "server", "offline")


@click.command(name="bench")
@bundle_argument
@click.option("--scenario", type=click.Choice(_SCENARIOS), default=_SCENARIOS[0], show_default=True)
@click.option("--tower", type=click.Choice(("text", "image")), default="text", show_default=True)
@click.option("--seconds", type=float, default=10.0, show_default=True, help="How long queries are sent.")
@click.option("--rate", type=float, help="Queries a second; for the server scenario.")
@click.option("--bound-ms", type=float, default=100.0, show_default=True, help="p99 that server must keep.")
@click.option("--variant", help="Which variant; by default what finalize chose here, or the bundle.")
@click.option("--instances", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1), help="An operator's.")
@click.option("--max-batch", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--delay-us", default=0, show_default=True, type=click.IntRange(min=0), help="Queue delay.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the measurement here, as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it here, as SVG.")
@click.option("--compare", type=click.Path(path_type=Path), help="An earlier --output to compare with.")
@json_option
@click.pass_obj
def command(
    app: App,
    bundle: Path,
    scenario: str,
    tower: str,
    seconds: float,
    rate: float | None,
    bound_ms: float,
    variant: str | None,
    instances: int,
    threads: int,
    max_batch: int,
    delay_us: int,
    output: Path | None,
    plot: Path | None,
    compare: Path | None,
) -> None:
    """Measure BUNDLE under the load of a scenario: golden inputs, raw, through the runner."""
    import asyncio
    from typing import cast

    import msgspec

    from edgeglm.bench.bundle_bench import BenchConfig, Tower, bundle_measurement
    from edgeglm.bench.measurement import Scenario, changes, measurement_from_file
    from edgeglm.bench.plot import svg_from_measurement
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.runtime.batch_queue import BatchPolicy
    from edgeglm.runtime.config import RunnerConfig

    for path in (output, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"there is no folder for {path}; choose a folder that is there")
    earlier = measurement_from_file(compare) if compare is not None else None
    config = BenchConfig(
        scenario=cast("Scenario", scenario),
        tower=cast("Tower", tower),
        seconds=seconds,
        rate=rate,
        bound_ms=bound_ms,
        runner=RunnerConfig(
            variant=variant,
            instances=instances,
            threads=threads,
            batching=BatchPolicy(max_batch_size=max_batch, max_queue_delay_microseconds=delay_us),
        ),
    )
    with open_bundle(bundle) as opened:
        found = asyncio.run(bundle_measurement(opened, config))
    if output is not None:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    if plot is not None:
        plot.write_text(svg_from_measurement(found))
    compared = changes(earlier, found) if earlier is not None else []
    _print(app, found, compared)
    app.emit({"measurement": found, "changes": compared})


def _print(app: App, found: Measurement, compared: list[Change]) -> None:
    app.pairs(
        [
            ("bundle", f"{found.bundle}, {found.variant}, {found.tower} tower, {found.engine}"),
            ("machine", found.machine),
            ("load", f"{found.scenario}, {found.queries} queries, {found.samples} samples"),
            ("throughput", f"{found.throughput:,.1f} samples/s"),
            ("latency", ", ".join(f"{name} {value:.3g} ms" for name, value in found.latency_ms.items())),
            ("batches", ", ".join(f"{calls} of {size}" for size, calls in sorted(found.batches.items()))),
            ("LoadGen", "valid" if found.valid else f"not valid: {found.verdict}"),
        ]
    )
    if compared:
        app.table(
            ["figure", ">before", ">after", ">ratio"],
            [(c.name, f"{c.before:.4g}", f"{c.after:.4g}", f"{c.ratio:.3f}") for c in compared],
        )
