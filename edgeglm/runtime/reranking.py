"""The second look: a bundle's fused re-ranker orders the first images of a text query anew.

Shapes: G gallery rows, A candidates, N patches, C channels of a patch, L tokens.
"""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.bundle.opened import Bundle
from edgeglm.core.errors import UserError
from edgeglm.data.tokenization import Tokenizer
from edgeglm.runtime.retrieval import (
    EngineFactory,
    Retriever,
    SearchResult,
    TowerEngine,
    check_count,
    onnxruntime_engine,
)

FOLDER = "reranker"
MODEL, PATCHES, SETTINGS = (f"{FOLDER}/{name}" for name in ("model.onnx", "patches.npy", "settings.json"))


class RerankerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``reranker/settings.json``: how many of the first images are ordered anew."""

    candidates: Annotated[int, msgspec.Meta(ge=1)]


def pair_scores(
    engine: TowerEngine,
    patches_ANC: npt.NDArray[Any],
    ids_L: npt.NDArray[np.int64],
    cosine_A: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Return what the re-ranker says of one text and each candidate: float32 [A]."""
    ids_AL = np.broadcast_to(ids_L, (len(patches_ANC), len(ids_L)))
    feeds: dict[str, npt.NDArray[Any]] = {
        "patches": np.asarray(patches_ANC, np.float32),
        "input_ids": np.ascontiguousarray(ids_AL),
        "attention_mask": np.ones(ids_AL.shape, np.int64),
        "cosine": np.asarray(cosine_A, np.float32),
    }
    return np.asarray(engine.infer(feeds)["score"], np.float32)[:, 0]


class Reranker:
    """The re-ranker of a bundle. Use it as a context manager; the bundle stays open meanwhile.

    It runs in ONNX Runtime and in FP32 whatever the towers run in: what they give it is a cosine.

    Raises:
        UserError: The bundle has none, one that does not fit its gallery, or was replaced by another.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int = 2, engine: EngineFactory = onnxruntime_engine
    ) -> None:
        if MODEL not in bundle.manifest.files:
            raise UserError(
                f"the bundle {bundle.origin} has no re-ranker; "
                "build it with --set reranker.enabled=true, or leave --rerank out"
            )
        self._bundle = bundle
        self.candidates = bundle.parsed(SETTINGS, RerankerSettings).candidates
        try:
            self._patches = np.load(bundle.unchanged(PATCHES), mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise bundle.broken(PATCHES, error) from error
        text = bundle.preprocessing.text
        self._tokenizer = Tokenizer(bundle.tokenizer_path, lowercase=text.lowercase)
        self._max_length = text.max_length
        self._engine = engine(bundle.unchanged(MODEL), threads)

    def __enter__(self) -> Reranker:
        """Load the model."""
        self._engine.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the model back."""
        self._engine.__exit__(kind, error, trace)

    def search_text(self, retriever: Retriever, query: str, k: int = 10) -> SearchResult:
        """Search with the towers, then order the first images anew; those behind them stay behind.

        ``score`` of the former is the re-ranker's: the cosine and what it adds. Raises UserError as the
        retriever does, and for a re-ranker that gives NaN or infinity.
        """
        check_count(k)
        found = retriever.search_text(query, max(k, self.candidates))
        if len(self._patches) != len(retriever.gallery.items):
            raise self._bundle.broken(
                PATCHES, f"it has {len(self._patches)} rows for {len(retriever.gallery.items)} items"
            )
        first, rest = found.hits[: self.candidates], found.hits[self.candidates :]
        if first:
            scores_A = pair_scores(
                self._engine,
                self._patches[[hit.row for hit in first]],
                self._tokenizer.encode([query], max_length=self._max_length)[0][0],
                np.asarray([hit.score for hit in first], np.float32),
            )
            if not np.isfinite(scores_A).all():
                raise self._bundle.broken(MODEL, "it gives NaN or infinity on this machine")
            order = np.argsort(-scores_A, kind="stable")
            first = tuple(replace(first[place], score=float(scores_A[place])) for place in order.tolist())
        hits = (*first, *rest)[:k]
        return SearchResult(variant=found.variant, model=f"{found.model} and {MODEL}", hits=hits)
