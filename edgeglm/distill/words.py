"""What the teacher says to each word alone, where no evaluation asks for that word.

The text student's vocabulary starts from these rows. An entry that is itself the whole of an evaluated
query is never put to the teacher: its row is foretold from the teacher's own input table, by what the
teacher says to the others.

Shapes: W entries of the vocabulary, K of them known, A of them asked for, I width of the teacher's input
table, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeglm.data.tokenization import Tokenizer
from edgeglm.data.tracks import folded
from edgeglm.evaluate.towers import token_embeddings

Rows = npt.NDArray[np.float32]
Chosen = npt.NDArray[np.bool_]

#: Of the fit below. On MiniLM's words kept out of it the foretold row has a cosine of 0.84 with the teacher's
#: answer; a linear fit has 0.73, the 50 nearest words 0.79, the mean 0.19.
RIDGE = 0.05
CENTRES = 3000
_MOST_ROWS = 30_000  # that the fit sees; bounds its memory to 400 MB
_MARKS = ("\u2581", "\u0120", "##")


def forbidden_texts(asked: Collection[str], captions: Collection[str]) -> set[str]:
    """Return the folded texts that some evaluation asks for and training may not see."""
    return {folded(text) for text in asked} - {folded(text) for text in captions}


def asked_entries(tokenizer: Tokenizer, forbidden: Collection[str]) -> Chosen:
    """Return which entries of the vocabulary are a forbidden text by themselves, bool [W].

    By spelling, whatever the mark of a piece and its case, and by how the tokenizer reads the text: an
    answer to the entry would be the answer to the query.
    """
    entries = tokenizer.vocabulary()
    found = np.array([folded(_plain(entry)) in forbidden for entry in entries], bool)
    special = tokenizer.lone_tokens().shape[1] - 1
    for text in forbidden:
        row = tokenizer.encode([text])[0][0]
        if len(row) == special + 1:
            found[row[special // 2]] = True
    return found


def word_rows(path: Path, tokenizer: Tokenizer, forbidden: Collection[str], *, threads: int) -> Rows:
    """Return a start for each entry of the vocabulary, float32 [W, D].

    It is what the text tower at ``path`` says to the entry alone, except for the entries of
    ``asked_entries``.
    """
    asked_W = asked_entries(tokenizer, forbidden)
    said = token_embeddings(path, tokenizer, np.flatnonzero(~asked_W), threads=threads)
    rows_WD = np.empty((len(asked_W), said.shape[1]), np.float32)
    rows_WD[~asked_W] = said
    table_WI = input_table(path, len(asked_W))
    if table_WI is None:
        rows_WD[asked_W] = said.mean(0)
    elif asked_W.any():
        letters_W = np.array([_plain(entry).isalpha() for entry in tokenizer.vocabulary()], bool)
        known_W = ~asked_W & letters_W if (~asked_W & letters_W).sum() > 1 else ~asked_W
        rows_WD[asked_W] = foretold(rows_WD[known_W], table_WI[known_W], table_WI[asked_W])
    return rows_WD


def foretold(said_KD: Rows, known_KI: Rows, asked_AI: Rows) -> Rows:
    """Return what a teacher may say to words that it is not asked, float32 [A, D].

    Kernel ridge regression from input rows of length one to answers, with a linear part: the kernel
    exp(-|a - b|^2) at up to ``CENTRES`` of the known words (Nystroem's subset of regressors; Rasmussen &
    Williams, Gaussian Processes, 2006, 8.3.1). A found row gets the usual length of an answer.

    Args:
        said_KD: What the teacher says to the words it may be asked, float32 [K, D].
        known_KI: Their rows in its input table.
        asked_AI: The rows of the others.
    """
    rng = np.random.default_rng(0)
    if len(known_KI) > _MOST_ROWS:
        chosen = np.sort(rng.choice(len(known_KI), _MOST_ROWS, replace=False))
        said_KD, known_KI = said_KD[chosen], known_KI[chosen]
    origin = known_KI.mean(0)
    known_KI, asked_AI = _of_length_one(known_KI - origin), _of_length_one(asked_AI - origin)
    centres_CI = known_KI[rng.permutation(len(known_KI))[:CENTRES]]

    def columns(rows_NI: Rows) -> Rows:
        return np.concatenate([np.exp(2 * (rows_NI @ centres_CI.T - 1)), rows_NI], 1, dtype=np.float32)

    known_KF, middle_D = columns(known_KI), said_KD.mean(0)
    mean_F = known_KF.mean(0)
    known_KF -= mean_F
    gram = (known_KF.T @ known_KF).astype(np.float64)
    gram[np.diag_indices_from(gram)] += RIDGE
    weights_FD = np.linalg.solve(gram, (known_KF.T @ (said_KD - middle_D)).astype(np.float64))
    found_AD = _of_length_one((columns(asked_AI) - mean_F) @ weights_FD + middle_D)
    rows: Rows = (found_AD * np.linalg.norm(said_KD, axis=1).mean()).astype(np.float32)
    return rows


def _of_length_one(rows: Any) -> Any:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def input_table(path: Path, entries: int) -> Rows | None:
    """Return the rows of the table that a text tower looks its tokens up in, float32 [entries, I].

    None where the graph holds no such table: a matrix of at least ``entries`` rows that a Gather reads.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    read = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    tables = [
        tensor
        for tensor in graph.initializer
        if tensor.name in read and len(tensor.dims) == 2 and tensor.dims[0] >= entries
    ]
    if not tables:
        return None
    widest = max(tables, key=lambda tensor: tensor.dims[0])
    return np.asarray(numpy_helper.to_array(widest)[:entries], np.float32)


def _plain(entry: str) -> str:
    for mark in _MARKS:
        entry = entry.removeprefix(mark)
    return entry
