"""Retrieval from a bundle: embed a query with a variant's towers and rank that variant's gallery.

Shapes: N queries, G gallery rows, D embedding dimensions, R resolution, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from edgeglm.bundle.opened import Bundle, Gallery
from edgeglm.core.errors import UserError
from edgeglm.data.tokenization import Tokenizer, is_unicode
from edgeglm.data.transforms import model_input_from_files
from edgeglm.engines.profiles import in_length_bucket

T = TypeVar("T")
Array = npt.NDArray[Any]
FloatRows = npt.NDArray[np.float32]

BATCH = 32


class TowerEngine(Protocol):
    """What runs one tower; every engine of ``edgeglm.engines`` is one."""

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``{output name: array}`` for one batch."""

    def __enter__(self) -> TowerEngine:
        """Load the model."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the resources back."""


EngineFactory = Callable[[Path, int], TowerEngine]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One result. ``score`` is a cosine; ``row`` its place in the gallery."""

    score: float
    row: int
    id: str
    text: str
    thumbnail: Path | None


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Hits, the best first, and the file that the query went through."""

    variant: str
    model: str
    hits: tuple[Hit, ...]


def onnxruntime_engine(path: Path, threads: int) -> TowerEngine:
    """Make the ONNX Runtime engine of one file. Raises UserError where ONNX Runtime is absent."""
    from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, threads=threads)


class Retriever:
    """Searches the gallery of a bundle. Use it as a context manager.

    Args:
        bundle: An opened bundle.
        variant: Which variant's towers and gallery; the bundle's default for None.
        threads: Threads inside an operator.
        engine: Makes an engine from (ONNX file, threads).

    ``variant`` and ``model_name(tower)`` say what is used, for printing beside the results. Files are read
    when they are first needed; UserError is raised where another bundle took this one's place meanwhile.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        variant: str | None = None,
        threads: int = 2,
        engine: EngineFactory = onnxruntime_engine,
    ) -> None:
        self.bundle = bundle
        self.record = bundle.variant(variant)
        self.threads = threads
        self._make_engine = engine
        self._preprocessing = bundle.preprocessing
        self._engines: dict[str, TowerEngine] = {}
        self._resources = ExitStack()
        self._gallery: Gallery | None = None
        self._tokenizer: Tokenizer | None = None

    @property
    def variant(self) -> str:
        """The name of the variant in use."""
        return self.record.name

    def model_name(self, tower: str) -> str:
        """Return the path, within the bundle, of the file that runs a tower."""
        return self.record.files[tower]

    @property
    def gallery(self) -> Gallery:
        """The gallery that this variant embedded, read once."""
        if self._gallery is None:
            for name in ("gallery/items.jsonl", f"gallery/embeddings-{self.variant}.npy"):
                self.bundle.unchanged(name)
            self._gallery = self.bundle.gallery(self.variant)
        return self._gallery

    def __enter__(self) -> Retriever:
        """Return the retriever; each tower is loaded when it is first needed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engines. The bundle stays open: whoever opened it closes it."""
        self.close()

    def close(self) -> None:
        """Close the engines; a second call does nothing."""
        self._engines.clear()
        self._resources.close()

    def embed_text(self, texts: Sequence[str]) -> FloatRows:
        """Return float32 [N, D], L2-normalised. Raises UserError for an empty text."""
        for text in texts:
            if not text.strip():
                raise UserError("a query is empty; give it a word")
            if not is_unicode(text):
                raise UserError("a query is no Unicode; type it in a terminal that writes UTF-8")
        if self._tokenizer is None:
            path = self.bundle.unchanged("tokenizer/tokenizer.json")
            self._tokenizer = Tokenizer(path, lowercase=self._preprocessing.text.lowercase)
        rows = []
        for batch in _batches(texts):
            ids, mask = self._tokenizer.encode(batch, max_length=self._preprocessing.text.max_length)
            rows.append(self._embedding("text", {"input_ids": ids, "attention_mask": mask}))
        return self._stacked("text", rows)

    def embed_images(self, images: Sequence[bytes | Path]) -> FloatRows:
        """Return float32 [N, D], L2-normalised, of raw picture files. Raises UserError with the path."""
        rows = []
        for batch in _batches(images):
            files = cast("list[Path]", batch)  # it takes bytes and paths alike, each list of one kind
            pixels = model_input_from_files(files, self._preprocessing.image)
            rows.append(self._embedding("image", {"pixels": pixels}))
        return self._stacked("image", rows)

    def embed_model_input(self, tower: str, feeds: Mapping[str, Array]) -> FloatRows:
        """Return float32 [N, D] of what the model itself takes: for checks of what is before it."""
        return self._embedding(tower, feeds)

    def search_text(self, query: str, k: int = 10) -> SearchResult:
        """Rank the gallery for a text. Raises UserError for an empty query or k below 1."""
        return self._searched("text", self.embed_text([query])[0], k)

    def search_image(self, image: bytes | Path, k: int = 10) -> SearchResult:
        """Rank the gallery for a picture file. Raises UserError for one that cannot be decoded."""
        return self._searched("image", self.embed_images([image])[0], k)

    def _searched(self, tower: str, query_D: FloatRows, k: int) -> SearchResult:
        gallery = self.gallery
        if gallery.embeddings.shape[1] != len(query_D):
            raise self.bundle.broken(
                f"gallery/embeddings-{self.variant}.npy",
                f"its rows have {gallery.embeddings.shape[1]} dimensions, the query {len(query_D)}",
            )
        scores_G = gallery.embeddings @ query_D
        if not np.isfinite(scores_G).all():
            raise self.bundle.broken(f"gallery/embeddings-{self.variant}.npy", "it holds NaN or infinity")
        hits = tuple(self._hit(int(row), float(scores_G[row])) for row in best_rows(scores_G, k))
        return SearchResult(variant=self.variant, model=self.model_name(tower), hits=hits)

    def _hit(self, row: int, score: float) -> Hit:
        item = self.gallery.items[row]
        return Hit(score=score, row=row, id=item.id, text=item.text, thumbnail=self.bundle.thumbnail(item))

    def _embedding(self, tower: str, feeds: Mapping[str, Array]) -> FloatRows:
        if tower not in self._engines:
            self.bundle.model(self.variant, tower)  # or an error with the towers that there are
            path = self.bundle.unchanged(self.model_name(tower))
            self._engines[tower] = self._resources.enter_context(self._make_engine(path, self.threads))
        engine = self._engines[tower]
        if tower == "text" and self._tokenizer is not None and getattr(engine, "exact_shapes", False):
            longest, values = self._preprocessing.text.max_length, {"input_ids": self._tokenizer.pad_id}
            feeds = {
                name: in_length_bucket(rows, longest, values.get(name, 0)) for name, rows in feeds.items()
            }
        outputs = engine.infer(feeds)
        if "embedding" not in outputs:
            raise self.bundle.broken(self.model_name(tower), f"it gives {sorted(outputs)}, not 'embedding'")
        embedding_ND = np.asarray(outputs["embedding"], dtype=np.float32)
        if not np.isfinite(embedding_ND).all():
            raise self.bundle.broken(self.model_name(tower), "it gives NaN or infinity on this machine")
        return embedding_ND

    def _stacked(self, tower: str, rows: list[FloatRows]) -> FloatRows:
        if rows:
            return np.concatenate(rows)
        return np.zeros((0, self.bundle.manifest.towers[tower].embedding_dim), dtype=np.float32)


def check_count(k: object) -> None:
    """Raise UserError unless ``k`` results can be asked for."""
    if not isinstance(k, int) or isinstance(k, bool):
        raise UserError(f"{k!r} results were asked for; ask for a whole number, at least 1")
    if k < 1:
        raise UserError(f"{k} results were asked for; ask for at least 1")


def best_rows(scores_G: FloatRows, k: int) -> npt.NDArray[np.int64]:
    """Return the rows of the ``k`` highest scores, the best first; equal scores keep the gallery's order.

    Selects before it sorts, so a large gallery costs O(G + k log k). Raises UserError for k below 1.
    """
    check_count(k)
    k = min(k, len(scores_G))
    if k == 0:
        return np.zeros(0, dtype=np.int64)
    edge = np.partition(scores_G, len(scores_G) - k)[len(scores_G) - k]
    above, level = np.flatnonzero(scores_G > edge), np.flatnonzero(scores_G == edge)
    chosen = np.concatenate([above, level[: k - len(above)]])
    return chosen[np.lexsort((chosen, -scores_G[chosen]))].astype(np.int64)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    listed = list(items)
    for start in range(0, len(listed), BATCH):
        yield listed[start : start + BATCH]
