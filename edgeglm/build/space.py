"""How far the variants of a bundle share one embedding space, measured on what a user would search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgeglm.build.evaluations import read_preprocessing
from edgeglm.build.tower_scores import TowerScores
from edgeglm.bundle.fingerprint import FloatRows, cross_agreement
from edgeglm.bundle.manifest import SpaceRecord
from edgeglm.core.stage import Inputs
from edgeglm.data.pairs import PairSet
from edgeglm.data.tokenization import Tokenizer
from edgeglm.evaluate.towers import TextSettings, text_embeddings

_QUERIES = 512


def measured_space(
    pairs: PairSet, inputs: Inputs, variants: Sequence[str], *, reference: str, threads: int
) -> SpaceRecord:
    """Return the agreement of every variant with the reference: the worse of its two towers.

    Texts are the names that the evaluation asks for, images those of the galleries; either way the ten
    nearest images among the reference's embeddings are compared.

    Args:
        pairs: The evaluated pairs.
        inputs: Of the pack stage: ``quantize`` with models and embeddings, ``export`` with the tokenizer.
        variants: Their names.
        reference: The variant whose space it is.
        threads: Of ONNX Runtime.
    """
    probe = _Probe(pairs, inputs, reference, threads)
    quantized = inputs["quantize"].path
    return SpaceRecord(
        agreement={
            variant: probe.agreement(_model(quantized, variant), _images(quantized, variant)[probe.chosen])
            for variant in variants
            if variant != reference
        }
    )


def agreement_of_files(
    pairs: PairSet,
    inputs: Inputs,
    towers: Mapping[str, Path],
    scores: TowerScores,
    *,
    reference: str,
    threads: int,
) -> float:
    """Return the same for files ``{tower: path}`` that were made after the quantize stage, as lane A is.

    ``scores`` embeds the images, unless it did already.
    """
    probe = _Probe(pairs, inputs, reference, threads)
    rows = pairs.shown_images()
    images = scores.embeddings(towers["image"], [rows[row] for row in probe.chosen])
    # As TensorRT computes, for which lane A is.
    return probe.agreement(towers["text"], images, integers=False)


class _Probe:
    """What is asked of every variant, and what the reference answers; ``chosen`` are rows of the gallery."""

    def __init__(self, pairs: PairSet, inputs: Inputs, reference: str, threads: int) -> None:
        quantized, exported = inputs["quantize"].path, inputs["export"].path
        settings = read_preprocessing(exported)
        tokenizer = Tokenizer(exported / "tokenizer.json", lowercase=settings.text.lowercase)
        self._settings = TextSettings(tokenizer=tokenizer, max_length=settings.text.max_length)
        asked = dict.fromkeys(query.text for track in pairs.tracks for query in track.queries)
        self._asked = list(asked)[:_QUERIES]
        self._threads = threads
        self._gallery = _images(quantized, reference)
        self._texts = self._texts_of(_model(quantized, reference))
        count = len(self._gallery)
        self.chosen = np.linspace(0, count - 1, min(_QUERIES, count)).astype(int)

    def agreement(self, text: Path, images: FloatRows, *, integers: bool = True) -> float:
        """Return the worse agreement of a text tower and of images [chosen] with the reference."""
        return min(
            cross_agreement(self._texts_of(text, integers), self._texts, self._gallery),
            cross_agreement(images, self._gallery[self.chosen], self._gallery),
        )

    def _texts_of(self, model: Path, integers: bool = True) -> FloatRows:
        return text_embeddings(model, self._asked, self._settings, threads=self._threads, integers=integers)


def _model(quantized: Path, variant: str) -> Path:
    return quantized / "models" / variant / "text.onnx"


def _images(quantized: Path, variant: str) -> FloatRows:
    return np.asarray(np.load(quantized / f"embeddings-{variant}.npy"), np.float32)
