"""The task's metrics of pairs of ONNX files, each tower embedded once: a search changes one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.build.evaluations import read_preprocessing
from edgeglm.build.pools import gate_pools, pool_gates
from edgeglm.calibration.variants import Verdict
from edgeglm.core.digest import sha256_file
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.evaluate.gates import Verdict as GateVerdict
from edgeglm.evaluate.retrieval import TrackMetrics, UnusableEmbeddingsError, evaluate_tracks
from edgeglm.evaluate.towers import TextSettings, gallery_images, image_embeddings, text_embeddings

T = TypeVar("T")
FloatRows = npt.NDArray[np.float32]
_KEPT = 4  # files a tower whose embeddings are remembered: FP32 and the latest


class TowerScores:
    """What pairs of files keep of the task.

    Args:
        pairs: The data.
        exported: The export artifact, for its preprocessing and tokenizer.
        threads: Inside an operator.
        seed: Of the bootstrap.
        minimum: The least ratio to FP32 of every pool.
        integers: As in :class:`edgeglm.engines.onnxruntime_engine.OnnxRuntimeEngine`.
    """

    def __init__(
        self,
        pairs: PairSet,
        exported: Path,
        *,
        threads: int,
        seed: int,
        minimum: float,
        integers: bool = True,
    ) -> None:
        preprocessing = read_preprocessing(exported)
        tokenizer = Tokenizer(exported / "tokenizer.json", lowercase=preprocessing.text.lowercase)
        self.pools = gate_pools(pairs.tracks)
        self._pairs, self._threads, self._seed, self._minimum = pairs, threads, seed, minimum
        self._integers = integers
        self._preprocessing = preprocessing.image
        self._text = TextSettings(tokenizer=tokenizer, max_length=preprocessing.text.max_length)
        self._images: dict[str, FloatRows] = {}
        self._texts: dict[str, dict[tuple[str, ...], FloatRows]] = {}

    def metrics(
        self,
        files: Mapping[str, Path],
        *,
        precisions: MutableMapping[str, npt.NDArray[np.float64]] | None = None,
    ) -> dict[str, Any]:
        """Return the metrics of every track, or ``{"unusable": why}`` for embeddings that are not finite.

        ``precisions`` is filled with AP@10 of each query, float64 [Q], by track.
        """
        texts = _remembered(self._texts, sha256_file(files["text"]), dict[tuple[str, ...], FloatRows])

        def embedded(queries: list[str]) -> FloatRows:
            key = tuple(queries)
            if key not in texts:
                texts[key] = text_embeddings(
                    files["text"], queries, self._text, threads=self._threads, integers=self._integers
                )
            return texts[key]

        try:
            rows = self.image_rows(files["image"])
            found = evaluate_tracks(
                self._pairs.tracks, embedded, rows, seed=self._seed, precisions=precisions
            )
        except UnusableEmbeddingsError as error:
            return {"unusable": str(error)}
        return msgspec.to_builtins(found)  # type: ignore[no-any-return]

    def image_rows(self, path: Path) -> FloatRows:
        """Return the embeddings float32 [N, D] of all images, zero outside the galleries."""

        def made() -> FloatRows:
            chosen = gallery_images(self._pairs.tracks)
            found = self._embedded(path, chosen)
            rows = np.zeros((len(self._pairs.images), found.shape[1]), np.float32)
            rows[chosen] = found
            return rows

        return _remembered(self._images, sha256_file(path), made)

    def embeddings(self, path: Path, images: Sequence[int]) -> FloatRows:
        """Return the embeddings float32 [n, D] of these images; those of no gallery are made here."""
        rows = self.image_rows(path)
        evaluated = set(gallery_images(self._pairs.tracks))
        if others := [index for index in images if index not in evaluated]:
            rows = rows.copy()
            rows[others] = self._embedded(path, others)
        return rows[images]

    def forget(self) -> None:
        """Drop all embeddings."""
        self._images.clear()
        self._texts.clear()

    def judged(self, metrics: Mapping[str, Any], baseline: Mapping[str, Any]) -> Verdict:
        """Hold the worst pool of queries against the gate."""
        if "unusable" in metrics:
            return Verdict(passed=False, score=0.0, reason=str(metrics["unusable"]))
        found, reference = _typed(metrics), _typed(baseline)
        gates = pool_gates("mAP@10 / FP32", found, reference, self.pools, self._minimum)
        verdict = GateVerdict(candidate="it", gates=gates)
        score = min(gate.value for gate in gates)
        return Verdict(passed=verdict.passed, score=score, reason=verdict.worst.sentence())

    def _embedded(self, path: Path, images: Sequence[int]) -> FloatRows:
        return image_embeddings(
            path,
            self._pairs.images,
            images,
            preprocessing=self._preprocessing,
            threads=self._threads,
            integers=self._integers,
        )


def _remembered(kept: dict[str, T], key: str, make: Callable[[], T]) -> T:
    """Return what is kept under a key, made if it is not; the oldest but the first (FP32's) goes."""
    if key not in kept:
        while len(kept) >= _KEPT:
            del kept[list(kept)[1]]
        kept[key] = make()
    return kept[key]


def _typed(metrics: Mapping[str, Any]) -> dict[str, TrackMetrics]:
    return msgspec.convert(dict(metrics), dict[str, TrackMetrics])
