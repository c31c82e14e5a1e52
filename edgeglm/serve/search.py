"""What a server searches: the bundle's own gallery, or anything else that keeps this protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeglm.bundle.opened import Bundle
from edgeglm.core.errors import UserError
from edgeglm.runtime.retrieval import best_rows
from edgeglm.serve.refusals import NotFoundError

FloatRow = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One result. ``score`` is a cosine; ``picture`` says whether ``Searcher.picture(id)`` has one."""

    id: str
    score: float
    text: str = ""
    picture: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Searcher(Protocol):
    """Finds the nearest of many embeddings. Its methods are called in threads, several at a time."""

    @property
    def name(self) -> str:
        """What it is, for people: ``gallery``, or an index's name."""

    @property
    def size(self) -> int:
        """How many rows it holds now."""

    @property
    def carried(self) -> bool:
        """Whether the bundle carries it: rows in memory, without metadata to filter by."""

    def search(self, query_D: FloatRow, count: int, where: Mapping[str, Any] | None) -> Sequence[Found]:
        """Return the best rows, the best first. Raises UserError for a filter it cannot apply."""

    def picture(self, id: str) -> Path | bytes:
        """Return the picture file of a row, or a WebP. Raises NotFoundError; ``id`` comes from outside."""

    def close(self) -> None:
        """Give the resources back."""


def described(searcher: Searcher, rows: int) -> dict[str, Any]:
    """Return what a caller is told of what was searched."""
    return {"name": searcher.name, "rows": rows, "filters": not searcher.carried}


class GallerySearcher:
    """Searches what the bundle carries."""

    name = "gallery"
    carried = True

    def __init__(self, bundle: Bundle, variant: str) -> None:
        self._bundle = bundle
        self._gallery = bundle.gallery(variant)
        self._rows = {item.id: row for row, item in enumerate(self._gallery.items)}

    @property
    def size(self) -> int:
        """How many rows the gallery has."""
        return len(self._gallery.items)

    def search(self, query_D: FloatRow, count: int, where: Mapping[str, Any] | None) -> Sequence[Found]:
        """Return the best rows of the gallery, the best first; it has no metadata to filter by."""
        if where:
            raise UserError("the gallery has no metadata to filter by; serve an index, or leave 'where' out")
        scores_G = self._gallery.embeddings @ query_D
        items = self._gallery.items
        return [
            Found(
                id=items[row].id,
                score=float(scores_G[row]),
                text=items[row].text,
                picture=self._bundle.thumbnail(items[row]) is not None,
            )
            for row in best_rows(scores_G, count)
        ]

    def picture(self, id: str) -> Path:
        """Return the thumbnail of a row, looked up by its id and never by a path from outside."""
        row = self._rows.get(id)
        item = self._gallery.items[row] if row is not None else None
        if item is None or self._bundle.thumbnail(item) is None:
            raise NotFoundError(f"the gallery has no picture {id!r}; take an id from a search")
        try:
            return self._bundle.unchanged(f"gallery/{item.thumbnail}")
        except UserError as error:  # a build has put another bundle there, whose pictures are others' by now
            raise NotFoundError(
                f"the picture {id!r} is gone or another since this server opened its bundle; "
                "load the bundle that is there now, or start the server again"
            ) from error

    def close(self) -> None:
        """Close nothing: the bundle is the service's."""
