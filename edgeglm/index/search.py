"""The nearest rows: a scan over small codes, then exact scores for the candidates.

Q queries, N rows, D dimensions, C candidates. faiss scans: its kernels use what the processor has (AVX-512,
AVX2, NEON). Where it is not installed all rows are compared exactly, which takes longer and finds no less.
The scores are cosines with the rows as they are stored in float16.
"""

from __future__ import annotations

import os
from functools import cache, cached_property
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.core.quiet import quiet
from edgeglm.index.codes import ByteRows, FloatRows, binary_codes, unit_rows
from edgeglm.index.generation import Codes
from edgeglm.runtime.retrieval import best_rows

Rows = npt.NDArray[np.int64]
PRECISIONS = ("int8", "binary", "exact")
_FEW = 4096  # rows that are compared exactly as soon as they are scanned
_BLOCK = 16384  # rows widened to float32 at a time


class Scanner:
    """Searches rows that hold still. May be called from several threads; faiss releases the interpreter."""

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        self._lock = Lock()

    def nearest(
        self, queries_QD: FloatRows, count: int, *, precision: str, chosen: Rows | None = None
    ) -> tuple[Rows, FloatRows]:
        """Return the rows and their cosines, int64 and float32 [Q, min(count, rows)], the best first.

        Equal scores keep the rows' order.

        Args:
            queries_QD: float32 [Q, D].
            count: How many, 1 or more.
            precision: "int8" scans bytes, "binary" bits, "exact" everything, as all do without faiss.
            chosen: The rows to look at, ascending; all for None.

        Raises:
            UserError: A count below 1, an unknown precision, a query of zeros or NaN.
        """
        if count < 1:
            raise UserError(f"{count} results were asked for; ask for at least 1")
        if precision not in PRECISIONS:
            raise unknown_name("precision", precision, PRECISIONS)
        try:
            queries = unit_rows(queries_QD)
        except ValueError as error:
            raise UserError(str(error)) from error
        total = len(self._codes) if chosen is None else len(chosen)
        count = min(count, total)
        rows = np.zeros((len(queries), count), np.int64)
        scores = np.zeros((len(queries), count), np.float32)
        if count == 0:
            return rows, scores
        if precision == "exact" or total <= _FEW or _faiss() is None:
            candidates: list[Rows | None] = [chosen] * len(queries)
        elif precision == "int8":
            candidates = list(self._by_bytes(queries, min(max(4 * count, count + 32), total), chosen))
        else:
            candidates = list(self._by_bits(queries, min(max(40 * count, 1024), total), count, chosen))
        for number, (query, among) in enumerate(zip(queries, candidates, strict=True)):
            rows[number], scores[number] = self._best(query, among, count)
        return rows, np.clip(scores, -1.0, 1.0)  # rows in float16 may be longer than 1 by a rounding

    def _best(
        self, query_D: npt.NDArray[np.float32], among: Rows | None, count: int
    ) -> tuple[Rows, FloatRows]:
        exact = self._codes.exact
        rows = np.arange(len(exact)) if among is None else np.sort(among)
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _BLOCK):
            part = exact[start : start + _BLOCK] if among is None else exact[rows[start : start + _BLOCK]]
            np.matmul(part.astype(np.float32), query_D, out=scores[start : start + len(part)])
        order = best_rows(scores, count)
        return rows[order], scores[order]

    def _by_bytes(self, queries_QD: FloatRows, count: int, chosen: Rows | None) -> Rows:
        with self._lock:
            index = self._bytes
        faiss = _scanning(len(queries_QD))
        # Its kernels round a query to bytes as well; the scale of a query changes no order.
        queries_QD = queries_QD * (127.0 / np.abs(queries_QD).max(axis=1, keepdims=True))
        if chosen is None:
            return np.asarray(index.search(queries_QD, count)[1], np.int64)
        bits = np.zeros(len(self._codes), np.bool_)
        bits[chosen] = True
        selector = faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
        found = index.search(queries_QD, count, params=faiss.SearchParameters(sel=selector))[1]
        return np.asarray(found, np.int64)

    def _by_bits(self, queries_QD: FloatRows, candidates: int, count: int, chosen: Rows | None) -> list[Rows]:
        """Scan bits, then rank the candidates by their bytes, so that few exact rows are read."""
        codes: ByteRows = self._codes.binary if chosen is None else self._codes.binary[chosen]
        _, found = _scanning(len(queries_QD)).knn_hamming(
            binary_codes(queries_QD, self._codes.centre), codes, candidates, variant="mc"
        )
        kept = min(max(4 * count, 64), candidates)
        result = []
        for query, near in zip(queries_QD, found, strict=True):
            rows = near.astype(np.int64) if chosen is None else chosen[near]
            rows.sort()
            close = self._codes.int8[rows].astype(np.float32) @ query
            result.append(rows[np.argpartition(close, -kept)[-kept:]])
        return result

    @cached_property
    def _bytes(self) -> Any:
        """The int8 codes in faiss's memory: it cannot scan ours."""
        faiss = _faiss()
        codes = self._codes.int8
        kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
        index = faiss.IndexScalarQuantizer(codes.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
        faiss.copy_array_to_vector(np.ascontiguousarray(codes).reshape(-1), index.codes)
        index.ntotal = len(codes)
        return index


def _scanning(queries: int) -> Any:
    """Return faiss, told to scan with no more threads than there are queries, which is how it shares work.

    With more, each thread of a server that searches would gather a crew of its own for one query: 10 ms where
    a scan of 5,000 rows takes one and a half. The number is one of the calling thread.
    """
    faiss = _faiss()
    faiss.omp_set_num_threads(min(queries, os.cpu_count() or 1))
    return faiss


@cache
def _faiss() -> Any:
    """Return the library; None where it is not installed: an index grows, and must not end a server by it."""
    with quiet:  # SWIG is told as deprecated, on newer Pythons
        try:
            import faiss
        except ModuleNotFoundError as error:
            if error.name != "faiss":  # it is there, and broken
                raise
            return None
    return faiss
