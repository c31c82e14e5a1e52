"""A server's view of an index: rows found, pictures served, another embedding space refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeglm.bundle.opened import Bundle
from edgeglm.core.errors import UserError
from edgeglm.index.space import require_index_space
from edgeglm.index.vector_index import VectorIndex
from edgeglm.serve.refusals import NotFoundError, NotReadyError
from edgeglm.serve.search import FloatRow, Found


class IndexSearcher:
    """Searches an index; what a writer adds or removes meanwhile is seen by the next search.

    Raises UserError where the variant embeds in another space than the index's.
    """

    carried = False

    def __init__(self, path: Path, bundle: Bundle, variant: str) -> None:
        self._index = VectorIndex(path)
        self.name = path.resolve().name
        try:
            require_index_space(self._index.header, bundle, variant, path)
            # so that the first caller does not wait for the library and the rows
            self._index.search(np.ones(self._index.header.dimensions, np.float32), 1)
        except BaseException:
            self._index.close()
            raise

    @property
    def size(self) -> int:
        """How many rows the index has."""
        return len(self._index)

    def search(self, query_D: FloatRow, count: int, where: Mapping[str, Any] | None) -> Sequence[Found]:
        """Return the best rows, the best first.

        Raises UserError for a filter that cannot be applied, NotReadyError where the index was damaged,
        removed or replaced by one of another space: no caller can help that.
        """
        try:
            self._index.view()
        except UserError as error:
            raise NotReadyError(str(error)) from error
        (matches,) = self._index.search(query_D, count, where=where)
        found = []
        for match in matches:
            text = match.metadata.get("text", "")
            found.append(
                Found(
                    id=match.id,
                    score=match.score,
                    text=text if isinstance(text, str) else "",
                    picture=match.picture,
                    metadata=match.metadata,
                )
            )
        return found

    def picture(self, id: str) -> bytes:
        """Return the picture that the index keeps of a row, as WebP. Raises NotFoundError."""
        found = self._index.picture(id)
        if found is None:
            raise NotFoundError(f"the index has no picture {id[:200]!r}; take an id from a search")
        return found

    def close(self) -> None:
        """Close the index."""
        self._index.close()
