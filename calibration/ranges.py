"""Activation ranges by ONNX Runtime's calibraters, in memory that does not grow with the samples."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeglm.calibration.ort_calls import Range, fp32_session, with_outputs
from edgeglm.calibration.schemes import Method
from edgeglm.core.errors import UserError

if TYPE_CHECKING:
    import onnx

_PERCENTILE = 99.99
_BINS = 2048
_SHRINKS = 0.5 ** np.linspace(0.0, 4.0, 97)  # of the largest range, to a sixteenth of it


class RangeCollector:
    """Activation ranges of a model by several methods, in one pass over batches that it does not keep.

    The calibraters are ONNX Runtime's. It has none for the least squared error, and ModelOpt's 0.47
    answers with ranges that destroy a model (its call of ``fake_tensor_quant`` gives the bits as a bias),
    so that one is found here, on ONNX Runtime's histogram. Only histograms stay, so that memory does not
    grow with the samples.

    Args:
        model: FP32, with inferred shapes.
        tensors: Names of the activations.
        methods: What :meth:`ranges` is asked for.
        threads: Threads inside an operator.
    """

    def __init__(
        self, model: onnx.ModelProto, tensors: Collection[str], methods: Sequence[Method], *, threads: int = 1
    ) -> None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        self.methods = tuple(methods)
        self.inputs = {value.name for value in model.graph.input} & set(tensors)
        self.tensors = sorted(set(tensors) - self.inputs)
        self._folder = tempfile.TemporaryDirectory(prefix="edgeglm-ranges-")
        path = Path(self._folder.name) / "augmented.onnx"
        with_outputs(model, self.tensors, path)
        self._session = fp32_session(str(path), threads=threads)
        self._extremes: dict[str, Range] = {}
        self._histograms = {
            name: HistogramCollector(
                method=name,
                symmetric=False,
                num_bins=_BINS if name == "percentile" else 128,
                num_quantized_bins=128,
                percentile=_PERCENTILE,
                scenario="same",
            )
            for name in ("percentile", "entropy")
            if name in self.methods or (name == "percentile" and "mse" in self.methods)
        }

    def __enter__(self) -> RangeCollector:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self._folder.cleanup()

    def see(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        """Run one batch and take its values into the histograms; a tensor may be empty in some batches."""
        values = dict(zip(self.tensors, self._session.run(self.tensors, dict(feeds)), strict=True))
        values |= {name: feeds[name] for name in self.inputs}
        values = {name: array for name, array in values.items() if array.size}
        for name, array in values.items():
            low, high = float(array.min()), float(array.max())
            seen = self._extremes.get(name, (low, high))
            self._extremes[name] = (min(low, seen[0]), max(high, seen[1]))
        with contextlib.redirect_stdout(io.StringIO()):
            for histogram in self._histograms.values():
                histogram.collect(values)

    def ranges(self) -> dict[str, dict[Method, Range]]:
        """Return the ranges found so far: tensor -> method -> (lowest, highest). More may be seen after.

        Raises UserError for a tensor that was empty in every batch.
        """
        if empty := sorted({*self.tensors, *self.inputs} - set(self._extremes)):
            raise UserError(
                f"{empty[0]!r} is empty in every batch that ranges are found on; "
                "give samples that reach it, such as pictures with something to detect"
            )
        found: dict[str, dict[Method, Range]] = {name: {"max": r} for name, r in self._extremes.items()}
        with contextlib.redirect_stdout(io.StringIO()):
            for method, histogram in self._histograms.items():
                for name, result in histogram.compute_collection_result().items():
                    found[name][method] = self._within(name, float(result[0]), float(result[1]))
        if "mse" in self.methods:
            for name, (counts, edges, *_) in self._histograms["percentile"].get_histogram_dict().items():
                found[name]["mse"] = self._within(name, *_least_squares(counts, edges, self._extremes[name]))
        return found

    def _within(self, name: str, low: float, high: float) -> Range:
        """Clip a range to the values that were seen; one of no width is no range."""
        least, most = self._extremes[name]
        low, high = max(low, least), min(high, most)
        return (low, high) if low < high else (least, most)


def _least_squares(counts: npt.NDArray[Any], edges: npt.NDArray[Any], extremes: Range) -> Range:
    """Return the range whose 256 steps have the least squared error over a histogram."""
    centres = (edges[1:] + edges[:-1]).astype(np.float64) / 2
    low, high = min(extremes[0], 0.0), max(extremes[1], 0.0)  # a quantized range always holds zero

    def error(shrink: float) -> float:
        least, most = low * shrink, high * shrink
        step = max((most - least) / 255, 1e-30)
        rounded = np.clip(np.rint((centres - least) / step), 0, 255) * step + least
        return float(np.sum(counts * (rounded - centres) ** 2))

    best = min(_SHRINKS, key=error)
    return float(low * best), float(high * best)
