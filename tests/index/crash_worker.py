"""Changes an index until it is killed. Run as a program: forks a fresh writer for each line of stdin."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgeglm.index.records import IndexHeader
from edgeglm.index.vector_index import VectorIndex, create_index
from edgeglm.index.writer import IndexWriter, NewRow

DIMENSIONS = 24
State = dict[str, tuple[int, bytes]]
"""``{id: (number that seeds its vector and is its metadata, picture)}``."""


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(DIMENSIONS).astype(np.float32)


def new_index(path: Path) -> Path:
    create_index(path, IndexHeader(space="5" * 64, dimensions=DIMENSIONS))
    return path


def changed(state: State, seed: int, step: int) -> tuple[State, dict[str, Any]]:
    """Return the state after a step, and the step: it depends on nothing but the arguments."""
    rng = np.random.default_rng([seed, step])
    known = sorted(state)
    if known and rng.random() < 0.4:
        gone = [known[i] for i in sorted(set(rng.integers(0, len(known), 3).tolist()))]
        return {id: row for id, row in state.items() if id not in gone}, {"remove": gone}
    ids = {f"row-{rng.integers(0, 60)}" for _ in range(rng.integers(1, 6))}
    rows = {
        id: (int(rng.integers(1 << 30)), bytes(rng.bytes(int(rng.integers(0, 300))))) for id in sorted(ids)
    }
    return {**state, **rows}, {"add": rows}


def apply(writer: IndexWriter, change: dict[str, Any]) -> None:
    if "remove" in change:
        writer.remove(change["remove"])
        return
    rows = [NewRow(id=id, metadata={"n": n}, picture=data) for id, (n, data) in change["add"].items()]
    writer.add(rows, np.stack([vector(n) for n, _ in change["add"].values()]))


def state_of(index: VectorIndex) -> State:
    """Read everything back, and hold every vector against what it must be."""
    view = index.view()
    found: State = {}
    for row, entry in enumerate(view.entries):
        (match,) = index.search(np.asarray(view.codes.exact[row], np.float32), 1, precision="exact")[0]
        assert match.id == entry.id
        number = match.metadata["n"]
        wanted = vector(number) / np.linalg.norm(vector(number))
        assert np.abs(view.codes.exact[row].astype(np.float32) - wanted).max() < 1e-3
        found[entry.id] = (number, index.picture(entry.id) or b"")
    return found


def change_until_killed(path: Path, seed: int, acknowledged: int) -> None:
    with VectorIndex(path) as index:
        state = state_of(index)
    os.write(acknowledged, b"r")
    with IndexWriter(path, fold_bytes=3000) as writer:
        for step in range(100_000):
            state, change = changed(state, seed, step)
            apply(writer, change)
            os.write(acknowledged, b"a")


def main() -> None:
    path = Path(sys.argv[1])
    for line in sys.stdin:
        seed = int(line)
        child = os.fork()
        if child == 0:
            change_until_killed(path, seed, 2)
        os.write(1, f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(1, f"ended {status}\n".encode())


if __name__ == "__main__":
    main()
