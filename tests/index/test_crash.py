from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeglm.index.vector_index import VectorIndex
from edgeglm.index.writer import IndexWriter
from tests.index.crash_worker import State, apply, changed, new_index, state_of

KILLS = 50
SEED = 2  # its first two steps add rows


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill takes nothing from the page cache, and more steps fit."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="edgeglm-crash-") as folder:
        yield Path(folder)


def test_kill_9_at_fifty_moments_loses_nothing_acknowledged_and_corrupts_nothing(
    memory_folder: Path, repository: Path
):
    path = new_index(memory_folder / "index")
    chance = random.Random(0)
    steps_seen = folds = 0
    with subprocess.Popen(
        [sys.executable, "-m", "tests.index.crash_worker", str(path)],
        cwd=repository,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        assert nursery.stderr is not None
        state: State = {}
        for seed in range(KILLS):
            nursery.stdin.write(f"{seed}\n".encode())
            nursery.stdin.flush()
            child = int(nursery.stdout.readline())
            assert nursery.stderr.read(1) == b"r"  # it has read the index and begins to change it
            seen = len(nursery.stderr.read(chance.randrange(15)))  # on a busy machine too it gets some way
            time.sleep(chance.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            assert nursery.stdout.readline() == b"ended %d\n" % signal.SIGKILL
            os.set_blocking(nursery.stderr.fileno(), False)
            acknowledged = seen + len(nursery.stderr.read() or b"")
            os.set_blocking(nursery.stderr.fileno(), True)
            for step in range(acknowledged):
                state, _ = changed(state, seed, step)
            unfinished, _ = changed(state, seed, acknowledged)
            with VectorIndex(path) as index:
                found = state_of(index)
                assert index.check() == []
            assert found in (state, unfinished), f"after kill {seed}, {acknowledged} acknowledged"
            state = found
            steps_seen += acknowledged
        folds = max(int(folder.name[4:]) for folder in path.glob("gen-*")) - 1
        nursery.stdin.close()
    assert steps_seen > 5 * KILLS, "the writers were killed before they did anything"
    assert folds > 5, "no writer was killed near a fold"
    with IndexWriter(path):
        pass
    assert len(list(path.glob("*gen-*"))) == 1, "the next writer sweeps what killed ones left"


@pytest.mark.parametrize("kept", [0, 1, 20, 40, 100, -1])
def test_a_record_cut_off_at_any_byte_is_as_if_it_had_not_been_begun(tmp_path: Path, kept: int):
    path = new_index(tmp_path / "index")
    state, change = changed({}, SEED, 0)
    log = path / "gen-000001" / "log"
    with IndexWriter(path) as writer:
        apply(writer, change)
        whole = log.stat().st_size
        later, more = changed(state, SEED, 1)
        apply(writer, more)
    data = log.read_bytes()
    log.write_bytes(data[: whole + kept] if kept >= 0 else data[:-1])
    with VectorIndex(path) as index:
        assert state_of(index) == state
    with IndexWriter(path) as writer:
        assert log.stat().st_size == whole
        apply(writer, more)
    with VectorIndex(path) as index:
        assert state_of(index) == later
