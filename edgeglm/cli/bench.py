"""`edgeglm bench`: how fast a bundle is on this machine, as MLPerf LoadGen measures it."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, json_option, trust_options
from edgeglm.cli.unused_options import refuse_options
from edgeglm.core.errors import INTERRUPTED, UserError

if TYPE_CHECKING:
    from edgeglm.bench.measurement import Change, Difference, Measurement

_OF_A_RUN = (
    *("scenario", "tower", "seconds", "rate", "bound_ms", "variant"),
    *("instances", "threads", "max_batch", "delay_us"),
)
_SCENARIOS = ("single-stream", "multi-stream", "server", "offline")


@click.command(name="bench")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--scenario", type=click.Choice(_SCENARIOS), default=_SCENARIOS[0], show_default=True)
@click.option("--tower", type=click.Choice(("text", "image")), default="text", show_default=True)
@click.option("--seconds", type=float, default=10.0, show_default=True, help="How long queries are sent.")
@click.option("--rate", type=float, help="Queries a second; for the server scenario.")
@click.option("--bound-ms", type=float, default=100.0, show_default=True, help="p99 that server must keep.")
@click.option("--variant", help="Which variant; by default what finalize chose here, or the bundle.")
@click.option("--instances", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1, 256), help="An operator's.")
@click.option("--max-batch", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--delay-us", default=0, show_default=True, type=click.IntRange(min=0), help="Queue delay.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the measurement here, as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it here, as SVG.")
@click.option("--compare", type=click.Path(path_type=Path), help="An earlier --output to compare with.")
@click.option(
    "--with", "other", type=click.Path(path_type=Path), help="Compare this --output, in place of a new run."
)
@trust_options
@json_option
@click.pass_obj
def command(
    app: App,
    bundle: Path | None,
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
    other: Path | None,
) -> None:
    """Measure BUNDLE under the load of a scenario: golden inputs, raw, through the runner.

    With --compare A --with B two measurements that were written earlier are compared; no BUNDLE is needed.
    """
    import asyncio
    from typing import cast

    import msgspec

    from edgeglm.bench.bundle_bench import BenchConfig, Tower, bundle_measurement
    from edgeglm.bench.measurement import Scenario, check_alike, measurement_from_file
    from edgeglm.bench.plot import svg_from_measurement
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.runtime.batch_queue import BatchPolicy
    from edgeglm.runtime.config import RunnerConfig

    _check_files(output, plot, bundle, compared=(compare, other))
    if other is not None and (compare is None or bundle is not None):
        raise UserError("--with takes the place of a run; give --compare too, and no bundle")
    if other is None and bundle is None:
        raise UserError("nothing is to be measured; give a bundle, or --compare and --with")
    if other is not None:
        refuse_options(_OF_A_RUN, "--with compares what was measured before; leave it out")
    if scenario != "server":
        refuse_options(("bound_ms",), "it is of the server scenario; leave it out, or give --scenario server")
    earlier = measurement_from_file(compare) if compare is not None else None
    if earlier is not None and other is None:
        check_alike(earlier, scenario=scenario, tower=tower)  # before a run that nothing comes of
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
    if other is not None:
        found = measurement_from_file(other)
    else:
        assert bundle is not None
        with open_bundle(bundle, trust=app.trust()) as opened:
            try:
                found = asyncio.run(bundle_measurement(opened, config))
            except KeyboardInterrupt:
                atexit.register(_leave)
                raise
    try:
        _tell(app, found, earlier)  # before a disk that is full can keep it from whoever waited for it
    finally:  # also where a reader that has gone, such as a pager's, ends the printing
        if output is not None:
            _write(output, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        if plot is not None:
            _write(plot, svg_from_measurement(found).encode())


def _check_files(
    output: Path | None, plot: Path | None, bundle: Path | None, *, compared: tuple[Path | None, ...]
) -> None:
    """Raise UserError where a result cannot be written, or would take the place of something else."""
    for path in (output, plot):
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise UserError(f"there is no folder for {path}; choose a folder that is there")
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file in it")
        if bundle is not None and path.resolve().is_relative_to(bundle.resolve()):
            raise UserError(f"{path} lies in the bundle, which would be damaged; choose a place outside it")
    for measurement in (output, *compared):
        if measurement is not None and plot is not None and measurement.resolve() == plot.resolve():
            raise UserError(
                f"--plot would overwrite {measurement}, the measurement; give it a name of its own"
            )


def _leave() -> None:
    """End the process now: LoadGen's threads cannot be stopped, and crash an interpreter that ends first."""
    sys.stdout.flush()
    os._exit(INTERRUPTED)


def _write(path: Path, content: bytes) -> None:
    from edgeglm.bundle.atomic import disk_errors, put_in_place, staging_folder

    with disk_errors(path):
        if path.exists() and not path.is_file():  # a pipe or a device has nothing to lose
            path.write_bytes(content)
            return
        path = path.resolve()
        with staging_folder(path) as staging:  # an earlier measurement is whole until this one is
            (staging / "new").write_bytes(content)
            put_in_place(staging / "new", path)


def _tell(app: App, found: Measurement, earlier: Measurement | None) -> None:
    from edgeglm.bench.measurement import changes, differences

    compared = changes(earlier, found) if earlier is not None else []
    differ = differences(earlier, found) if earlier is not None else []
    _print(app, found)
    if earlier is not None:
        _print_compared(app, compared, differ)
    app.emit({"measurement": found, "changes": compared, "differences": differ})


def _print(app: App, found: Measurement) -> None:
    from edgeglm.bench.measurement import CLOCK, SHORT, figure_words

    latency = ", ".join(f"{name} {figure_words(value)} ms" for name, value in found.latency_ms.items())
    verdict = found.verdict if found.verdict.startswith(SHORT) else f"not valid: {found.verdict}"
    app.pairs(
        [
            ("bundle", f"{found.bundle}, {found.variant}, {found.tower} tower, {found.engine}"),
            ("machine", found.machine),
            ("load", f"{found.scenario}, {found.queries} queries, {found.samples} samples"),
            ("throughput", f"{found.throughput:,.1f} samples/s"),
            ("latency", latency),
            ("batches", ", ".join(f"{calls} of {size}" for size, calls in sorted(found.batches.items()))),
            ("clock", CLOCK),
            ("LoadGen", "valid" if found.valid else verdict),
        ]
    )


def _print_compared(app: App, compared: list[Change], differ: list[Difference]) -> None:
    from edgeglm.bench.measurement import figure_words

    app.table(
        ["figure", ">before", ">after", ">ratio"],
        [(c.name, figure_words(c.before, 4), figure_words(c.after, 4), f"{c.ratio:.3f}") for c in compared],
    )
    if differ:
        app.table(["differs", "before", "after"], [(d.name, str(d.before), str(d.after)) for d in differ])
