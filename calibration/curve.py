"""What INT8 keeps as the calibration set grows: so that users know when to stop."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgeglm.calibration.conversion import activations_of, int8_by_plan, whole_plan
from edgeglm.calibration.demands import fixed_batch
from edgeglm.calibration.feeds import Batches
from edgeglm.calibration.ort_calls import Ranges
from edgeglm.calibration.precision import fidelity
from edgeglm.calibration.preparation import prepared_model
from edgeglm.calibration.ranges import RangeCollector
from edgeglm.calibration.schemes import Method, x86_sums_16_bits
from edgeglm.calibration.scoring import Metric, baseline_of, score_of
from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress, QuietProgress
from edgeglm.engines.environment import cpu_flags


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """INT8 calibrated on the first ``samples`` samples.

    Attributes:
        samples: How many.
        kept: What is kept of FP32's score by a user's metric; None without one.
        mean_cosine, min_cosine: To FP32, on samples that no point's ranges were found on.
        moved: Mean change of the ranges' widths since the point before; 1 at the first.
    """

    samples: int
    kept: float | None = None
    mean_cosine: float
    min_cosine: float
    moved: float


def sizes_from_text(text: str) -> list[int]:
    """Parse ``16,32,64``. Raises UserError."""
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"cannot read the sizes {text!r}; write them as 16,32,64") from None
    if sizes[0] < 1:
        raise UserError(f"a calibration set of {sizes[0]} samples finds nothing; give sizes of 1 and more")
    return sizes


def curve_of_sizes(
    onnx_path: Path,
    batches: Batches,
    sizes: Sequence[int],
    *,
    method: Method = "max",
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> list[Point]:
    """Measure the whole model in static INT8 for each size, each sample run once for all sizes.

    Args:
        onnx_path: The FP32 model.
        batches: The samples; the last quarter only measures cosines.
        sizes: Ascending.
        method: How ranges are found.
        metric: A user's score of a file, measured on each point's file.
        progress: Told of each point.

    Raises UserError when a size leaves no sample to measure on.
    """
    most = largest_size(batches.samples, sizes, fixed=fixed_batch(onnx_path))
    baseline = None if metric is None else baseline_of(metric, onnx_path)
    prepared = prepared_model(onnx_path)
    scheme = "u8s8-chains" if prepared.has_convolutions else "u8s8"
    if x86_sums_16_bits(cpu_flags()):
        scheme += "-reduced"
    plan = whole_plan(prepared, scheme, method)
    held_out = Batches(batches.arrays, batches.batch_size, start=batches.start + most, stop=batches.stop)
    points: list[Point] = []
    before: Ranges = {}
    with (
        tempfile.TemporaryDirectory(prefix="edgeglm-curve-") as folder,
        RangeCollector(prepared.model, activations_of(prepared), (method,)) as collector,
        (progress or QuietProgress()).task("Calibration curve", total=len(sizes)) as task,
    ):
        seen = 0
        for size in sizes:
            rows = Batches(
                batches.arrays, batches.batch_size, start=batches.start + seen, stop=batches.start + size
            )
            for feeds in rows:
                collector.see(feeds)
            seen = size
            ranges = collector.ranges()
            out = Path(folder) / "int8.onnx"
            int8_by_plan(prepared, out, plan, ranges)
            found = fidelity(out, onnx_path, held_out)
            points.append(
                Point(
                    samples=size,
                    kept=None if metric is None or not baseline else score_of(metric, out) / baseline,
                    mean_cosine=found.mean_cosine,
                    min_cosine=found.min_cosine,
                    moved=_moved(before, ranges, method),
                )
            )
            before = ranges
            task.advance()
    return points


def largest_size(samples: int, sizes: Sequence[int], *, fixed: int = 0) -> int:
    """Return how many of ``samples`` may find ranges.

    Raises UserError when a size asks for more, or does not fill batches that the model takes whole.
    """
    step = max(1, fixed)
    for size in sizes:
        if size % step:
            raise UserError(f"the model takes batches of {step}, which {size} does not fill; give multiples")
    held = -(-max(1, samples // 4) // step) * step
    most = samples - held
    if sizes[-1] > most:
        raise UserError(
            f"{samples} samples leave {most} to calibrate on and {held} to measure, and the curve "
            f"asks for {sizes[-1]}; draw more samples, or give smaller sizes"
        )
    return most


def _moved(before: Ranges, after: Ranges, method: Method) -> float:
    if not before:
        return 1.0
    changes = []
    for name, found in after.items():
        width, old = (high - low for low, high in (found[method], before[name][method]))
        changes.append((width - old) / width if width else 0.0)
    return float(np.mean(changes))
