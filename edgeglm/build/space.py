"""How far the variants of a bundle share one embedding space, measured on what a user would search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeglm.build.evaluations import read_preprocessing
from edgeglm.bundle.fingerprint import cross_agreement
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
    quantized, exported = inputs["quantize"].path, inputs["export"].path
    settings = read_preprocessing(exported)
    text = TextSettings(
        tokenizer=Tokenizer(exported / "tokenizer.json", lowercase=settings.text.lowercase),
        max_length=settings.text.max_length,
    )
    asked = list(dict.fromkeys(query.text for track in pairs.tracks for query in track.queries))[:_QUERIES]

    def texts_of(variant: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return text_embeddings(_model(quantized, variant), asked, text, threads=threads)

    gallery, texts = _images(quantized, reference), texts_of(reference)
    chosen = np.linspace(0, len(gallery) - 1, min(_QUERIES, len(gallery))).astype(int)
    return SpaceRecord(
        agreement={
            variant: min(
                cross_agreement(texts_of(variant), texts, gallery),
                cross_agreement(_images(quantized, variant)[chosen], gallery[chosen], gallery),
            )
            for variant in variants
            if variant != reference
        }
    )


def _model(quantized: Path, variant: str) -> Path:
    return quantized / "models" / variant / "text.onnx"


def _images(quantized: Path, variant: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(np.load(quantized / f"embeddings-{variant}.npy"), np.float32)
