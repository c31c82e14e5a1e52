"""Peak memory of drawing samples and of finding ranges, few and many, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from quantization_models import newest

from edgeglm.calibration.feeds import write_npz
from edgeglm.core.store import Store
from edgeglm.data.pairs import PairSet
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine

ROOT = Path(__file__).resolve().parents[2]
FEW, MANY = 64, 10_000
ENTROPY_MOST = 256  # ONNX Runtime's Entropy keeps every activation: more would fill the machine
_COLLECTED = 4096  # its MinMax runs every sample twice
_CHILD = """
import json, resource, sys
from pathlib import Path
from edgeglm.calibration.feeds import Batches, mapped_npz
path, data, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if how.startswith("draw"):
    from edgeglm.calibration.drawing import Drawing, calibration_set_for_model
    count = len(next(iter(mapped_npz(data).values()))) if how == "draw all" else 64
    calibration_set_for_model(data, path, data.with_suffix(".set"), drawing=Drawing(samples=count))
elif how.startswith("edgeglm"):
    from edgeglm.calibration.conversion import ranges_from_batches
    from edgeglm.calibration.preparation import prepared_model
    batches = Batches(mapped_npz(data), 8)
    ranges_from_batches(prepared_model(path), batches, tuple(how.partition(" ")[2].split(",")))
else:
    import contextlib, io, tempfile
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator
    from edgeglm.calibration.modelopt_calls import FeedReader
    method = getattr(CalibrationMethod, how)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = str(Path(folder) / "augmented.onnx")
        made = create_calibrator(path, ["Conv", "Gemm"], augmented_model_path=out, calibrate_method=method)
        made.collect_data(FeedReader(Batches(mapped_npz(data), 8)))
        made.compute_data()
print(json.dumps({"peak_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""
_HOW = (
    ("draw 64", "edgeglm calibrate: 64 drawn of", MANY),
    ("draw all", "edgeglm calibrate: all drawn of", MANY),
    ("edgeglm max", "edgeglm ranges: max", MANY),
    ("edgeglm max,percentile,entropy,mse", "edgeglm ranges: max, percentile, entropy and mse", MANY),
    ("MinMax", "ONNX Runtime MinMax", _COLLECTED),
    ("Entropy", "ONNX Runtime Entropy", ENTROPY_MOST),
)


def memory_rows(store: Store, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the peak of each on few and on many samples of the student's image tower."""
    exported, pairs = newest(store, "export"), newest(store, "pairs")
    path = exported.path / "models" / "fp32" / "image.onnx"
    with OnnxRuntimeEngine(path, threads=1) as engine:
        side = engine.inputs[0].shape[2]
    example = {"pixels": PairSet.open(pairs).shown(range(64), int(side or 64))}
    for how, what, most in _HOW:
        peaks = [_peak(path, _data(folder, count, example), how) for count in (FEW, most)]
        yield {
            "what": what,
            "samples": [FEW, most],
            "peak_mb": [round(peak, 1) for peak in peaks],
            "growth": round(peaks[1] / peaks[0], 3),
        }


def _peak(path: Path, data: Path, how: str) -> float:
    command = [sys.executable, "-c", _CHILD, str(path), str(data), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_kb"]) / 1024


def _data(folder: Path, samples: int, example: Mapping[str, Any]) -> Path:
    """Return a file of ``samples`` rows like the example's, no two alike, written chunk by chunk."""
    path = folder / f"memory-{samples}.npz"

    def chunks() -> Iterator[dict[str, Any]]:
        rows = len(next(iter(example.values())))
        for start in range(0, samples, rows):
            count = min(rows, samples - start)
            yield {n: (a[:count] * np.float32(1 - start / 1e6)).astype(a.dtype) for n, a in example.items()}

    if not path.is_file():
        write_npz(path, chunks(), samples)
    return path
