from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.index import search
from edgeglm.index.codes import FloatRows
from edgeglm.index.generation import codes_of
from edgeglm.index.records import IndexHeader
from edgeglm.index.search import Scanner
from edgeglm.index.vector_index import VectorIndex, create_index
from edgeglm.index.writer import IndexWriter, NewRow

D = 64


def unit(count: int, seed: int = 0) -> FloatRows:
    rows: FloatRows = np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create_index(tmp_path / "shop", IndexHeader(space="a" * 64, dimensions=D))
    return tmp_path / "shop"


def filled(path: Path, count: int) -> FloatRows:
    vectors = unit(count)
    rows = [
        NewRow(id=f"r{i}", metadata={"n": i, "kind": "ab"[i % 2]}, picture=b"p%d" % i) for i in range(count)
    ]
    with IndexWriter(path) as writer:
        writer.add(rows, vectors)
    return vectors


def test_a_new_index_is_on_disk_before_it_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    sync = os.fsync

    def recorded(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    create_index(tmp_path / "shop", IndexHeader(space="a" * 64, dimensions=D))
    files = {file.name for file in (tmp_path / "shop").rglob("*") if file.is_file()} - {"CURRENT", "lock"}
    assert "index.json" in files
    # all that is in it, then the names in its folder, then its own name
    assert files | {"gen-000001", ".CURRENT.writing"} <= set(synced[:-2])
    assert synced[-2:] == ["index", tmp_path.name]


@pytest.mark.parametrize("precision", ["int8", "binary", "exact"])
def test_a_search_finds_what_the_exact_cosines_say(path: Path, precision: str):
    vectors = filled(path, 6000)
    with IndexWriter(path) as writer:
        writer.fold()
    clustered: FloatRows = vectors[::500] + np.float32(0.4) * unit(
        12, seed=5
    )  # near something, as queries are
    with VectorIndex(path) as index:
        found = index.search(clustered, 10, precision=precision)
        for query, matches in zip(clustered, found, strict=True):
            cosines = vectors @ (query / np.linalg.norm(query))
            best = np.argsort(-cosines)[:10]
            hit = len({f"r{i}" for i in best} & {match.id for match in matches})
            assert hit >= (10 if precision == "exact" else 8)
            assert matches[0].id == f"r{best[0]}"
            for match in matches:
                assert match.score == pytest.approx(cosines[int(match.id[1:])], abs=1e-3)
            assert [m.score for m in matches] == sorted((m.score for m in matches), reverse=True)


def test_bits_find_rows_that_all_point_one_way(path: Path):
    vectors = unit(6000) + np.float32(3.0) * unit(1, seed=77)  # a cone, as many towers make
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with IndexWriter(path) as writer:
        writer.add([NewRow(id=f"r{i}") for i in range(len(vectors))], vectors)
        writer.fold()
    with VectorIndex(path) as index:
        queries = vectors[::300] + np.float32(0.02) * unit(20, seed=6)
        shares = []
        for query, matches in zip(queries, index.search(queries, 10, precision="binary"), strict=True):
            best = {f"r{i}" for i in np.argsort(-(vectors @ query))[:10]}
            shares.append(len(best & {match.id for match in matches}) / 10)
        assert np.mean(shares) > 0.8  # 0.87; with plain signs 0.6


@pytest.mark.parametrize("precision", ["int8", "binary", "exact"])
def test_a_filter_is_kept_by_every_precision(path: Path, precision: str):
    filled(path, 12_000)
    with VectorIndex(path) as index:
        for where, wanted in (
            ({"kind": "a"}, lambda m: m["kind"] == "a"),
            ({"n": {">=": 100, "<": 9000}}, lambda m: 100 <= m["n"] < 9000),
            ({"n": [3, 4, 5]}, lambda m: m["n"] in (3, 4, 5)),
        ):
            (matches,) = index.search(unit(1, seed=9), 10, where=where, precision=precision)
            assert matches
            assert all(wanted(match.metadata) for match in matches)
        assert index.search(unit(1), 5, where={"n": -1})[0] == []


def test_what_is_added_replaced_and_removed_is_seen_by_a_reader_that_is_open(path: Path):
    vectors = filled(path, 50)
    with VectorIndex(path) as index:
        assert index.search(vectors[7], 1)[0][0].id == "r7"
        with IndexWriter(path) as writer:
            assert writer.remove(["r7", "nobody"]) == 1
            writer.add([NewRow(id="r8", metadata={"n": 800})], vectors[7:8])
        (match,) = index.search(vectors[7], 1)[0]
        assert (match.id, match.metadata) == ("r8", {"n": 800})
        assert index.picture("r8") is None
        assert index.picture("r9") == b"p9"
        assert len(index) == 49
        with IndexWriter(path) as writer:
            writer.fold()
        (again,) = index.search(vectors[7], 1)[0]
        assert (again.id, again.row) == (match.id, match.row)
        assert index.picture("r9") == b"p9"
        assert index.check() == []


def synced(source: Path, destination: Path, during: Callable[[], object]) -> None:
    """Copy a folder over another as ``rsync -a`` does: files take the others' names, and times are kept."""

    def facts(file: Path) -> tuple[int, int]:
        return file.stat().st_size, file.stat().st_mtime_ns

    folders = {destination}
    for file in sorted(source.rglob("*")):
        place = destination / file.relative_to(source)
        if file.is_dir() or (place.is_file() and facts(file) == facts(place)):
            continue
        new = place.with_name(f".{place.name}.x1")
        shutil.copy2(file, new)
        new.replace(place)
        folders.add(place.parent)
        during()
    for folder in folders:
        shutil.copystat(source / folder.relative_to(destination), folder)


def test_what_is_synced_over_an_open_index_is_found(path: Path, tmp_path: Path):
    """A server on a board found pictures for months that had been removed where the index is kept."""
    vectors = filled(path, 50)
    shutil.copytree(path, tmp_path / "board")
    with VectorIndex(tmp_path / "board") as index:
        assert index.search(vectors[7], 1)[0][0].id == "r7"
        with IndexWriter(path) as writer:
            writer.remove(["r7"])
            writer.add([NewRow(id="r60")], vectors[8:9])
        synced(path, tmp_path / "board", lambda: None)
        assert index.search(vectors[7], 1)[0][0].id != "r7"
        assert index.search(vectors[8], 1)[0][0].id in ("r8", "r60")
        assert len(index) == 50


def test_an_index_that_is_synced_file_by_file_never_stays_half_of_the_former(path: Path, tmp_path: Path):
    """Names of the former beside embeddings of the new one, of the same sizes, are each found for another."""
    vectors, anew = unit(50), tmp_path / "anew"
    create_index(anew, IndexHeader(space="a" * 64, dimensions=D))
    for place, ids in ((path, range(50)), (anew, reversed(range(50)))):
        with IndexWriter(place) as writer:
            writer.add([NewRow(id=f"r{n:02}") for n in ids], vectors)
            writer.fold()
    shutil.copytree(path, tmp_path / "board")
    with VectorIndex(tmp_path / "board") as index:

        def search() -> None:
            with suppress(UserError):  # half of it: damaged for the moment
                index.search(vectors[7], 1)

        synced(anew, tmp_path / "board", search)
        assert index.search(vectors[7], 1)[0][0].id == "r42"


def test_readers_search_on_while_a_writer_folds_again_and_again(path: Path):
    vectors = filled(path, 200)
    stop, wrong = threading.Event(), []

    def read() -> None:
        with VectorIndex(path) as index:
            while not stop.is_set():
                (match,) = index.search(vectors[3], 1)[0]
                if match.id != "r3" or index.picture("r3") != b"p3":
                    wrong.append(match)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    with IndexWriter(path, fold_bytes=1) as writer:
        for i in range(40):
            writer.add([NewRow(id=f"more{i}")], unit(1, seed=100 + i))
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    with VectorIndex(path) as index:
        assert len(index) == 240


def test_a_batch_that_is_refused_leaves_nothing(path: Path):
    with IndexWriter(path) as writer:
        for rows, vectors, why in (
            ([NewRow(id="a"), NewRow(id="a")], unit(2), "twice"),
            ([NewRow(id="")], unit(1), "0 bytes"),
            ([NewRow(id="x" * 2000)], unit(1), "2000 bytes"),
            ([NewRow(id="a\udc80")], unit(1), "cannot be kept"),
            ([NewRow(id="a", metadata={"x": object()})], unit(1), "plain data"),
            ([NewRow(id="a", metadata={"x": "y" * 70_000})], unit(1), "at most 65536"),
            ([NewRow(id="a")], unit(1)[:, :5], r"give \[1, 64\]"),
            ([NewRow(id="a")], unit(1) * np.float32("nan"), "NaN"),
            ([NewRow(id="a")], unit(1) * np.float32(0), "zero"),
        ):
            with pytest.raises(UserError, match=why):
                writer.add(rows, vectors)
    with VectorIndex(path) as index:
        assert len(index) == 0
        assert index.search(unit(1), 5) == [[]]


def test_a_second_writer_waits_and_then_says_so(path: Path):
    with (
        IndexWriter(path),
        pytest.raises(UserError, match=r"another process is changing.*try again"),
        IndexWriter(path, wait=0.1),
    ):
        pass


def test_a_fold_on_a_full_disk_keeps_what_was_added(path: Path, monkeypatch: pytest.MonkeyPatch):
    vectors = filled(path, 5)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with IndexWriter(path, fold_bytes=1) as writer:
        monkeypatch.setattr("edgeglm.index.writer.write_generation", full)
        writer.add([NewRow(id="kept")], unit(1, seed=3))
        assert "free some space" in writer.unfolded
    monkeypatch.undo()
    with VectorIndex(path) as index:
        assert len(index) == 6
        assert index.search(vectors[2], 1)[0][0].id == "r2"


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("CURRENT", b"gen-000009\n", "gen-000009 is missing"),
        ("CURRENT", b"../../etc\n", "names no generation"),
        ("index.json", b"{}", "is no index header"),
        ("index.json", b'{"schema_version": 99}', "upgrade edgeglm"),
        ("gen-000001/rows.msgpack", b"\x90", "is damaged"),
        ("gen-000001/manifest.json", b"{", "is damaged"),
        ("gen-000001/log", b"", None),
    ],
)
def test_a_damaged_index_is_refused_with_a_remedy(path: Path, name: str, data: bytes, why: str | None):
    filled(path, 3)
    with IndexWriter(path) as writer:
        writer.fold()
    name = name.replace("gen-000001", "gen-000002")
    (path / name).write_bytes(data)
    if why is None:
        with VectorIndex(path) as index:
            assert len(index) == 3
        return
    with pytest.raises(UserError, match=why):
        VectorIndex(path)


def test_no_score_is_more_than_a_cosine_can_be(path: Path):
    vectors = filled(path, 50)
    with VectorIndex(path) as index:
        found = [best[0].score for best in index.search(vectors, 1)]
    assert min(found) > 0.999
    assert max(found) == 1.0


def test_altered_vectors_are_found_by_a_check(path: Path):
    filled(path, 3)
    with IndexWriter(path) as writer:
        writer.fold()
    file = path / "gen-000002" / "exact.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with IndexWriter(path) as writer, pytest.raises(UserError, match=r"exact\.npy; restore the index"):
        writer.fold()  # whose digests would vouch for them
    with IndexWriter(path, fold_bytes=1) as writer:
        writer.add([NewRow(id=f"new{i}") for i in range(20)], unit(20))
        assert "exact.npy" in writer.unfolded
    with VectorIndex(path) as index:
        assert (len(index), index.check()) == (23, ["exact.npy"])


def test_a_query_that_fits_nothing_is_refused(path: Path):
    filled(path, 3)
    with VectorIndex(path) as index:
        cases: list[tuple[FloatRows, dict[str, Any], str]] = [
            (np.ones(5, np.float32), {}, "5 dimensions"),
            (np.ones(D, np.float32), {"count": 0}, "at least 1"),
            (np.ones(D, np.float32), {"precision": "int4"}, "unknown precision 'int4'"),
            (np.ones(D, np.float32), {"where": {"colour": "red"}}, "unknown metadata field 'colour'"),
            (np.full(D, np.nan, np.float32), {}, "NaN"),
        ]
        for query, arguments, why in cases:
            with pytest.raises(UserError, match=why):
                index.search(query, **{"count": 1, **arguments})
    with pytest.raises(UserError, match="there is no index"):
        VectorIndex(path / "nowhere")
    with pytest.raises(UserError, match="is there already"):
        create_index(path, IndexHeader(space="a" * 64, dimensions=D))


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_an_index_that_outgrows_a_device_without_faiss_is_searched_all_the_same(
    path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "faiss", None)
    search._faiss.cache_clear()
    vectors = filled(path, 4100)
    try:
        with VectorIndex(path) as index:
            (found,) = index.search(vectors[7], 3, precision=precision)
            (odd,) = index.search(vectors[7], 1, precision=precision, where={"kind": "b"})
    finally:
        search._faiss.cache_clear()
    assert found[0].id == odd[0].id == "r7"


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    dimensions=st.sampled_from([1, 3, 8, 17, 256]),
    k=st.integers(1, 50),
    chosen=st.booleans(),
)
def test_a_scan_of_few_rows_is_exact_whatever_their_number_and_size(seed, count, dimensions, k, chosen):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, dimensions)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9
    scanner = Scanner(codes_of(rows.astype(np.float16), 100.0, np.zeros(dimensions, np.float32)))
    query = rng.standard_normal((1, dimensions)).astype(np.float32)
    some = np.flatnonzero(rng.random(count) < 0.5) if chosen else None
    found, scores = scanner.nearest(query, k, precision="int8", chosen=some)
    among = np.arange(count) if some is None else some
    exact = rows.astype(np.float16)[among].astype(np.float32) @ (query[0] / np.linalg.norm(query[0]))
    wanted = np.sort(exact)[::-1][:k]
    assert np.allclose(scores[0], wanted, atol=1e-5)
    assert set(found[0].tolist()) <= set(among.tolist())


def test_a_closed_index_reads_no_file_that_took_its_number(path: Path, tmp_path: Path):
    filled(path, 3)
    index = VectorIndex(path)
    view = index.view()
    index.close()
    (tmp_path / "other").write_bytes(b"what nobody may see" * 100)
    with (tmp_path / "other").open("rb"):
        index.close()
        with pytest.raises(UserError, match="closed; open it again"):
            index.picture("r0")
        with pytest.raises(UserError, match="closed; open it again"):
            index.search(unit(1), 1)
    assert len(view) == 3
