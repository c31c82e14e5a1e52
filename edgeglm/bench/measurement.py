"""What a benchmark found: a record that is written, drawn and compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from edgeglm.core.errors import UserError

Scenario = Literal["single-stream", "multi-stream", "server", "offline"]
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
FIGURES = (*PERCENTILES, "mean", "max")
SHORT = "short run"
CLOCK = (
    "a query counts from LoadGen's call of Python, which may have waited for the interpreter; "
    "LoadGen does not tell when it was due"
)
_GRID = 201


class Measurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of one scenario.

    Attributes:
        bundle: The bundle's name.
        content_digest: What was really measured: two runs with one digest differ by machine or settings.
        engine: What ran the towers, in words.
        machine: The kind of machine, in words.
        settings: The runner's, and the wanted rate of the server scenario.
        queries: How many; one is 8 samples in multi-stream, and all samples in offline.
        seconds: From the first query to the last answer.
        throughput: Samples a second.
        latency_ms: Percentiles, mean and max of a query, from its issue (``CLOCK``) to its last answer; in
            the offline scenario of a sample, from the start of the run.
        curve_ms: The latency at 0 %, 0.5 %, ... 100 %: what the plots are drawn from.
        batches: ``{batch size: calls}``.
        valid: Whether LoadGen calls the run valid, and it was no shorter than LoadGen's own minimum.
        verdict: LoadGen's own words where it does not, or ``SHORT`` and by how much.
    """

    schema: Literal[1] = 1
    bundle: str
    content_digest: str
    variant: str
    tower: str
    scenario: Scenario
    engine: str
    machine: str
    settings: dict[str, int | float | str]
    queries: int
    samples: int
    seconds: float
    throughput: float
    latency_ms: dict[str, float]
    curve_ms: tuple[float, ...]
    batches: dict[int, int]
    valid: bool
    verdict: str = ""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of two runs; ``ratio`` is after / before."""

    name: str
    before: float
    after: float
    ratio: float


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What was not the same in two runs, beside their figures."""

    name: str
    before: int | float | str | None
    after: int | float | str | None


def latency_summary(latencies_ms: Sequence[float]) -> tuple[dict[str, float], tuple[float, ...]]:
    """Return percentiles, mean and max in ms, and the curve to draw."""
    times = np.asarray(latencies_ms, dtype=np.float64)
    summary = {name: float(np.percentile(times, at)) for name, at in PERCENTILES.items()}
    summary |= {"mean": float(times.mean()), "max": float(times.max())}
    curve = np.percentile(times, np.linspace(0, 100, _GRID))
    return {name: round(value, 4) for name, value in summary.items()}, tuple(
        round(float(value), 4) for value in curve
    )


def figure_words(value: float, digits: int = 3) -> str:
    """Format a figure with the digits that matter, thousands without an exponent: ``1647.2``: ``1,647``."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def measurement_from_file(path: Path) -> Measurement:
    """Read what ``edgeglm bench --output`` wrote. Raises UserError when it is something else."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Measurement)
    except FileNotFoundError:
        raise UserError(f"there is no measurement at {path}; write one with edgeglm bench --output") from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a measurement: {error}; write one with edgeglm bench --output"
        ) from error
    if missing := [name for name in FIGURES if name not in found.latency_ms]:
        raise UserError(f"{path} has no {', '.join(missing)}; write one with edgeglm bench --output")
    if len(found.curve_ms) < 2:
        raise UserError(f"{path} has no curve to draw; write one with edgeglm bench --output")
    return found


def check_alike(before: Measurement, *, scenario: str, tower: str) -> None:
    """Raise UserError for a run that has nothing in common with another scenario or tower."""
    for name, one, other in (("scenario", before.scenario, scenario), ("tower", before.tower, tower)):
        if one != other:
            raise UserError(f"the {name} was {one} and is {other}; compare runs of the same")


def changes(before: Measurement, after: Measurement) -> list[Change]:
    """Compare two runs of one scenario and tower. Raises UserError for runs that have nothing in common."""
    check_alike(before, scenario=after.scenario, tower=after.tower)
    pairs = [("throughput", before.throughput, after.throughput)]
    pairs += [(name, value, after.latency_ms[name]) for name, value in before.latency_ms.items()]
    return [
        Change(name=name, before=old, after=new, ratio=new / old if old else float("inf"))
        for name, old, new in pairs
    ]


def differences(before: Measurement, after: Measurement) -> list[Difference]:
    """Return what differed in what was measured, where and how; None where one run has no such setting."""
    names = ("bundle", "content_digest", "variant", "engine", "machine", "valid")
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    settings = sorted(before.settings.keys() | after.settings.keys())
    pairs += [(name, before.settings.get(name), after.settings.get(name)) for name in settings]
    return [Difference(name=name, before=old, after=new) for name, old, new in pairs if old != new]
